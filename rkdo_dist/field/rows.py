"""The field loss and its gradients in bounded memory: no B x B matrix, no autograd graph, no recomputation.

Rows are taken in panels, whose inner products with all columns are one matrix product; a panel is taken in strips
that stay in the cache, where they become logits (`affinity`) and a kernel (`kernels`) turns these into gradients in
place; two more products of the panel give the gradients of rows and columns. Memory beyond inputs and gradients is one
panel and a few strips; other affinities than the cosine add one strip, and lifted rows and columns.

When columns arrive in blocks (a ring of ranks), `FieldRows` makes the same computation in several walks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rkdo_dist.field import fused
from rkdo_dist.field.affinity import pulled_back
from rkdo_dist.field.kernels import FixedKernel, Kernel, RowSums, Walk
from rkdo_dist.field.objectives import Objective
from rkdo_dist.field.places import Place, Slice
from rkdo_dist.field.recursive_kernel import RecursiveKernel
from rkdo_dist.field.supervisors import LISTED, Identity, Listed, SameLabel, Supervisor

# Entries of a panel, and of all buffers of a strip together: large enough that starting threads (or a kernel) for
# each operation costs little, small enough for a CPU's outer cache, and a panel for a GPU's (40 MB or more). Sizes
# depend on nothing but the shape of the problem and the kind of device, so that results are reproducible.
PANEL_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 23}
STRIP_BUFFER_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 27}
PANEL_ROWS = 64  # at least: a matrix product of fewer rows wastes the machine
NARROW = 128  # width of embeddings up to which a CPU makes the columns' gradient as (d, n) faster than as (n, d)


class FieldRows:
    """b consecutive rows of the field, visited by its columns: all at once, or block after block.

    All at once is one visit, `fused`. In blocks, all blocks make the visits of `walks`, one walk after the
    other, after which `loss` and `parts` are known, and then the visit `differentiate`, after which
    `gradients` are.

    Args:
        objective: what to compute.
        rows: embeddings (b, d) of views "u" and "v", any floating dtype.
        batch: B, the number of samples of the global batch.
        first_row: index of the first row in the global batch.
        block: samples in a block of columns; B if there is one block.
        labels: (B,) integers, for objectives that need them.
        parts: whether `parts` will be asked for.
        supervisor: see `value_and_gradient`.
        temperature: whether `temperature_gradient` will be asked for.
        pooled: `Affinity.pool` of the columns of the whole global batch, (V, d) in the views `objective.column_views`.
        lanes: runs of equally many rows, which are summed by themselves: what is a scalar below is then (lanes,).

    Attributes:
        gradients: of `loss` with respect to the rows, by view that is one of rows, (b, d) in the computing dtype.
        pooled_gradient: of `loss` with respect to `pooled`, if a gradient passes there; `add_through_pool` uses it up.
        walks: the walks before `differentiate`.

    Raises:
        ValueError: if labels are missing or the rows do not lie within the batch.
    """

    def __init__(
        self,
        objective: Objective,
        rows: dict[str, Tensor],
        batch: int,
        first_row: int,
        block: int,
        labels: Tensor | None = None,
        parts: bool = True,
        supervisor: Supervisor | None = None,
        temperature: bool = True,
        pooled: Tensor | None = None,
        lanes: int | None = None,
    ) -> None:
        b = rows["u"].shape[0]
        if not 0 <= first_row <= batch - b:
            raise ValueError(f"rows {first_row}..{first_row + b - 1} do not lie within a batch of {batch}")
        if objective.needs_labels and labels is None:
            raise ValueError(f"objective {objective.name} needs labels")
        self.objective, self._b, self._first_row, self._block = objective, b, first_row, block
        dtype, device = computing_dtype(rows["u"].dtype), rows["u"].device
        self._rows = {name: x.to(dtype) for name, x in rows.items()}
        self._affinity, self._pooled = objective.affinity, pooled
        self._taking_part = objective.column_count(batch)
        self._supervisor = _supervisor(objective, first_row, b, batch, labels, dtype, device, supervisor)
        self._dtype, self._device = dtype, device
        self._sums = self._no_sums()
        self.gradients = {piece.rows: torch.zeros_like(self._rows[piece.rows]) for piece in objective.slices}
        self.pooled_gradient = torch.zeros_like(pooled) if pooled is not None and self._affinity.pools else None
        self._by_temperature = torch.zeros(b, dtype=torch.float64, device=device) if temperature else None
        self._lanes, self._lane = lanes, b // (lanes or 1)
        self._width = block * len(objective.slices[0].columns)
        self._panel_rows, self._strip_rows = tile_rows(b, self._width, objective.depth, device.type)
        self._kernel: Kernel
        if objective.recursion == "in_batch":
            shape = self._strip_rows, self._width
            self._kernel = _recursive_kernel(objective, self._supervisor, shape, dtype, device, parts)
        else:
            # works in the panel, without buffers; logits of a link have one of their own
            self._strip_rows = -(-self._panel_rows // (4 if self._affinity.links else 1))
            self._kernel = FixedKernel(objective, self._supervisor, self._taking_part, dtype)
        self.walks: Sequence[Walk] = self._kernel.walks

    def log_sum(self, columns: Tensor | None = None) -> Tensor:
        """log of the sum of exp(l / tau) over all columns of these rows, float64 scalar.

        Args:
            columns: all of them at once (see `visit`); None after all walks.
        """
        assert isinstance(self._kernel, FixedKernel), "an objective without recursion"
        if columns is not None:
            for walk in self.walks:
                self.visit(walk, columns, 0)
        found = torch.stack([self._kernel.row_log_sums(sums) for sums in self._sums])
        if self._lanes is None:
            return torch.logsumexp(found.flatten(), 0)
        return torch.logsumexp(found.view(len(found), self._lanes, self._lane).transpose(0, 1).flatten(1), 1)

    def normalise_by(self, log_normaliser: Tensor) -> None:
        """Begin again, with a normaliser that is known (see `field_normaliser`): one walk is left before the last."""
        assert isinstance(self._kernel, FixedKernel), "an objective without recursion"
        self._kernel.log_normaliser = log_normaliser.to(self._dtype)
        self._sums, self.walks = self._no_sums(), self._kernel.walks

    def _no_sums(self) -> list[RowSums]:
        depth = self.objective.depth
        return [RowSums.zeros(depth, self._b, self._dtype, self._device) for _ in self.objective.slices]

    def fused(self, columns: Tensor, home: Tensor) -> None:
        """The one visit of all columns at once (arguments as for `visit`)."""
        self.visit(self._kernel.fused, columns, 0, home)

    def measure(self, columns: Tensor) -> None:
        """The one visit of all columns at once that leaves no gradients behind."""
        self.visit(self._kernel.measure, columns, 0)

    def differentiate(self, columns: Tensor, first_column: int, home: Tensor) -> None:
        """The visit of a block after all walks (arguments as for `visit`)."""
        self.visit(self._kernel.differentiate, columns, first_column, home)

    def visit(self, walk: Walk, columns: Tensor, first_column: int, home: Tensor | None = None) -> None:
        """One visit of a block of columns.

        Args:
            walk: one of `walks`.
            columns: (V, n, d) in the computing dtype, contiguous: n consecutive samples in each of the views
                `objective.column_views`.
            first_column: index of the first of these samples in the global batch. The block holds either all
                samples of the rows or none.
            home: (V, n, d) in the computing dtype, contiguous; the gradient of the columns is added to it by walks that
                leave gradients behind.
        """
        for matrix in self._matrices(columns):
            self._visit(matrix, walk, 0, self._b, first_column, home)

    def fused_by_lane(self, columns: Tensor, add: Callable[[Tensor], None]) -> None:
        """`fused`, with the gradient of the columns (V, B, d) that each lane leaves behind handed to `add`, in order.

        Products are made lane by lane: a backend may choose another order of summation for other numbers of rows. All
        else, which treats every row by itself, is done for as many lanes at a time as fit a panel.
        """
        matrices, walk, m = self._matrices(columns), self._kernel.fused, self._lane
        at_once = max(1, self._panel_rows // (m * len(matrices)))
        rooms = [self._room(min(at_once * m, self._b)) for _ in matrices] if m <= self._panel_rows else []
        for first in range(0, self._b, at_once * m):
            last, given = min(first + at_once * m, self._b), zip(matrices, rooms, strict=bool(rooms))
            panels = [self._panel(matrix, walk, first, last, 0, room, differentiates=True) for matrix, room in given]
            for start in range(first, last, m):
                home = torch.zeros_like(columns)
                for number, matrix in enumerate(matrices):
                    if not panels:  # a lane of several panels
                        self._visit(matrix, walk, start, start + m, 0, home)
                        continue
                    here = slice(start - first, start - first + m)
                    gradient = self._gradient(matrix, home)
                    panel, mine = panels[number]
                    gradient.addmm_(panel[here].T, mine[here], alpha=self._factor(matrix))
                    self._home(matrix, gradient, home)
                if self.pooled_gradient is not None:
                    add_through_pool(self.objective, columns, self.pooled_gradient, home)
                    self.pooled_gradient.zero_()
                add(home)

    def release(self) -> None:
        """Release the workspace of the visits; a further visit allocates it again."""
        self._kernel.release()

    def loss(self) -> Tensor:
        """Sum of the row losses, float64 scalar."""
        pieces = zip(self.objective.slices, self._sums, strict=True)
        return torch.stack([p.weight * self._sum(self._kernel.row_loss(sums)) for p, sums in pieces]).sum(0)

    def parts(self) -> dict[str, Tensor]:
        """Sums of the rows' parts by name, float64 scalars."""
        pieces = zip(self.objective.slices, self._sums, strict=True)
        found = [p.weight * self._sum(torch.stack(self._kernel.row_parts(sums))) for p, sums in pieces]
        totals = torch.stack(found).sum(0).unbind()
        return dict(zip(self.objective.part_names, [*totals, self._at_uniform()], strict=True))

    def clear_gradients(self) -> None:
        """Forget `gradients`, before "differentiate" visits begin again."""
        for gradient in self.gradients.values():
            gradient.zero_()
        for total in (self.pooled_gradient, self._by_temperature):
            if total is not None:
                total.zero_()

    def temperature_gradient(self) -> Tensor:
        """Derivative of `loss` with respect to tau0, float64 scalar: the loss depends on l / tau0 alone, of the cosine
        on rows / tau0."""
        if self._affinity.lifts:
            assert self._by_temperature is not None
            return self._sum(self._by_temperature) / -self.objective.temperature
        inner = [self._sum((self._rows[name] * g).flatten()) for name, g in self.gradients.items()]
        return torch.stack(inner).sum(0) / -self.objective.temperature

    def _sum(self, values: Tensor) -> Tensor:
        """Sums of rows' values (..., k b), float64: (...), or of each lane (..., lanes)."""
        if self._lanes is not None:
            values = values.unflatten(-1, (self._lanes, -1))
        return values.sum(-1, dtype=torch.float64)

    def _matrices(self, columns: Tensor) -> list[_Matrix]:
        """The objective's matrices, with a block of columns (V, n, d), lifted."""
        found = []
        for piece, sums in zip(self.objective.slices, self._sums, strict=True):
            views = [self.objective.column_views.index(name) for name in piece.columns]
            flat = _flat(columns, views)
            lifted = self._affinity.lift_columns(flat, self._pooled, views) if self._affinity.lifts else flat
            found.append(_Matrix(piece, sums, views, lifted))
        return found

    def _gradient(self, matrix: _Matrix, home: Tensor) -> Tensor:
        """Where the gradient of a matrix's columns is summed up: in `home` (V, n, d) itself, if they are not lifted."""
        return torch.zeros_like(matrix.columns) if self._affinity.lifts else _flat(home, matrix.views)

    def _home(self, matrix: _Matrix, gradient: Tensor, home: Tensor) -> None:
        """Bring it home through the lift."""
        if not self._affinity.lifts:
            return
        lifted = matrix.columns.clone()  # used up
        flat = _flat(home, matrix.views)
        by_pool = self._affinity.columns_back(lifted, gradient, flat, self._pooled, matrix.views)
        if self.pooled_gradient is not None and by_pool is not None:
            self.pooled_gradient[matrix.views] += by_pool

    def _factor(self, matrix: _Matrix) -> float:
        """By which products of a panel with columns or rows are multiplied."""
        return matrix.piece.weight * self._kernel.scale * self._affinity.slope

    def _visit(
        self, matrix: _Matrix, walk: Walk, first: int, last: int, first_column: int, home: Tensor | None
    ) -> None:
        """One visit of the rows first..last - 1, panel by panel; `home` gets the gradient of the columns (V, n, d)."""
        gradient, room = None if home is None else self._gradient(matrix, home), self._room(self._panel_rows)
        narrow = self._device.type == "cpu" and matrix.columns.shape[1] <= NARROW
        turned = gradient.new_zeros(gradient.shape[::-1]) if gradient is not None and narrow else None
        for start in range(first, last, self._panel_rows):
            stop = min(start + self._panel_rows, last)
            panel, mine = self._panel(matrix, walk, start, stop, first_column, room, gradient is not None)
            if turned is not None:
                turned.addmm_(mine.T, panel, alpha=self._factor(matrix))
            elif gradient is not None:
                gradient.addmm_(panel.T, mine, alpha=self._factor(matrix))
        if gradient is not None and turned is not None:
            gradient.add_(turned.T)
        if home is not None and gradient is not None:
            self._home(matrix, gradient, home)

    def _room(self, rows: int) -> tuple[Tensor, Tensor]:
        """Memory of a panel, and of the logits of a strip."""
        panel = self._rows["u"].new_empty(rows, self._width)
        return panel, panel.new_empty(self._strip_rows, self._width) if self._affinity.links else panel

    def _panel(
        self,
        matrix: _Matrix,
        walk: Walk,
        start: int,
        stop: int,
        first_column: int,
        room: tuple[Tensor, Tensor],
        differentiates: bool,
    ) -> tuple[Tensor, Tensor]:
        """A walk over the rows start..stop - 1 by all columns of a block.

        Returns:
            What it leaves of the panel (r, n), and the lifted rows (r, d'). If it `differentiates`, their product times
            `_factor` is the gradient of the columns; that of the rows is added to `gradients`.
        """
        affinity, scale, piece, columns = self._affinity, self._kernel.scale, matrix.piece, matrix.columns
        rows, gradients = self._rows[piece.rows], self.gradients[piece.rows]
        by_temperature = self._by_temperature if differentiates and affinity.lifts else None
        lane = self._lane if self._lanes is not None else stop - start
        mine = affinity.lift_rows(rows[start:stop], self._pooled)
        scaled = mine if affinity.links else mine * scale
        panel, logits = room[0][: stop - start], room[1]
        for part, of_rows in zip(panel.split(lane), scaled.split(lane), strict=True):
            torch.mm(of_rows, columns.T, out=part)
        for first in range(start, stop, self._strip_rows):
            last = min(first + self._strip_rows, stop)
            place = Place(piece, first, self._first_row + first - first_column, first_column, self._block)
            strip = panel[first - start : last - start]
            if not affinity.links:
                walk(strip, matrix.sums.rows(first, last), place)
                continue
            part = logits[: last - first]
            affinity.link(strip, part, self._taking_part, scale)
            before = None if by_temperature is None else part.clone()
            walk(part, matrix.sums.rows(first, last), place)
            if by_temperature is not None and before is not None:
                by_temperature[first:last].add_(before.mul_(part).sum(1, dtype=torch.float64), alpha=piece.weight)
            if differentiates:
                torch.div(part, strip, out=strip)
        if differentiates:
            factor = self._factor(matrix)
            for at in range(start, stop, lane):
                here, own = slice(at, min(at + lane, stop)), slice(at - start, min(at + lane, stop) - start)
                if not affinity.lifts:
                    gradients[here].addmm_(panel[own], columns, alpha=factor)
                    continue
                found = torch.mm(panel[own], columns).mul_(factor)
                if by_temperature is not None and not affinity.links:
                    by_temperature[here].add_((mine[own] * found).sum(1, dtype=torch.float64))
                gradients[here] += affinity.rows_back(mine[own], found)
        return panel, mine

    def _at_uniform(self) -> Tensor:
        """Sum of the row losses if every learned row were uniform: log N - H(p(t)), summed over levels."""
        kept, total = 1.0, torch.zeros(self._lanes or (), dtype=torch.float64, device=self._device)
        for alpha in self.objective.couplings or (0.0,):
            kept *= 1 - alpha
            total += self._sum(math.log(self._taking_part) - self._supervisor.mixed_entropy(self._taking_part, kept))
        return total


@dataclass(frozen=True)
class _Matrix:
    """One matrix of the objective with a block of columns.

    Attributes:
        piece: which it is.
        sums: of all b rows.
        views: positions of its columns' views among those of the block.
        columns: (n, d) or lifted (n, d'), of its views one after the other.
    """

    piece: Slice
    sums: RowSums
    views: list[int]
    columns: Tensor


def _flat(block: Tensor, views: list[int]) -> Tensor:
    """The columns (n, d) of one or all views of a block (V, n, d)."""
    return block.flatten(0, 1) if len(views) == len(block) else block[views[0]]


def add_through_pool(objective: Objective, columns: Tensor, gradient: Tensor, home: Tensor) -> None:
    """Add to the columns' gradient what passes through the pool.

    Args:
        columns: those of a rank, or all of them (V, n, d).
        gradient: of the loss of all rows with respect to the pool, (V, d).
        home: (V, n, d).
    """

    def pool(x: Tensor) -> Tensor:
        pooled = objective.affinity.pool(x, len(x) * x.shape[1])
        assert pooled is not None
        return pooled

    home += pulled_back(pool, columns, gradient)


def field_normaliser(log_sums: Tensor, rows: int) -> Tensor:
    """log(Z / R): what every row is normalised by where the field is one distribution.

    Args:
        log_sums: (k,), `FieldRows.log_sum` of parts of the batch, together all of it, in an order that does not change.
        rows: R, rows of all matrices: B for one, 2B for two.
    """
    return torch.logsumexp(log_sums, 0) - math.log(rows)


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of the computation: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tile_rows(rows: int, columns: int, depth: int, device: str) -> tuple[int, int]:
    """Rows of a panel and of a strip for a matrix of rows x columns.

    A small problem gets smaller buffers: fresh memory costs time as well.
    """
    kind = device if device in PANEL_ELEMENTS else "cpu"
    panel = min(rows, max(PANEL_ROWS, PANEL_ELEMENTS[kind] // columns))
    most = STRIP_BUFFER_ELEMENTS[kind]
    buffers = min(most, max(most // 2, rows * columns))
    return panel, min(panel, max(1, buffers // ((2 * depth + 2) * columns)))


def _supervisor(
    objective: Objective,
    first_row: int,
    rows: int,
    batch: int,
    labels: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
    given: Supervisor | None,
) -> Supervisor:
    """p(0) of consecutive rows; arguments as for `FieldRows`."""
    taking_part, debias = objective.column_count(batch), objective.debias
    if given is not None:
        assert objective.supervisor == "rows", "only an objective whose supervisor is rows is given any"
        return given
    if objective.needs_labels and labels is not None:
        return SameLabel(labels, first_row, rows, objective.slices[0], taking_part, debias, dtype)
    if objective.supervisor in LISTED:
        positions, weights = LISTED[objective.supervisor](
            torch.arange(first_row, first_row + rows, device=device), batch
        )
        return Listed.of(positions, weights, taking_part, debias, dtype)
    return Identity(rows, device, taking_part, debias)


def _recursive_kernel(
    objective: Objective,
    supervisor: Supervisor,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    parts: bool,
) -> Kernel:
    """The fused kernel where there is one that can be trusted, else the eager one."""
    if fused.chosen(objective, dtype, device):
        from rkdo_dist.field.triton_kernels import TritonKernel

        return TritonKernel(objective, supervisor, *shape, dtype, device)
    return RecursiveKernel(objective, supervisor, *shape, dtype, device, parts)
