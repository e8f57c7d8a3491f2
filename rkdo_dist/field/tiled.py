"""The field loss and its gradients in bounded memory: no B x B matrix, no autograd graph, no recomputation.

Rows are taken in panels, whose inner products with all columns are one matrix product; a panel is taken in strips
that stay in the cache, where they become logits (`affinity`) and a kernel (`kernels`) turns these into gradients in
place; two more products of the panel give the gradients of rows and columns. Memory beyond inputs and gradients is one
panel and a few strips; other affinities than the cosine add one strip, and lifted rows and columns.

When columns arrive in blocks (a ring of ranks), `FieldRows` makes the same computation in several walks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
STRIP_BUFFER_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}
PANEL_ROWS = 64  # at least: a matrix product of fewer rows wastes the machine


@dataclass(frozen=True)
class FieldResult:
    """Sums over b rows and their gradients; B columns, d wide.

    Attributes:
        loss: sum of the row losses, float64 scalar.
        parts: sums of the rows' parts (names in `Objective.part_names`), float64 scalars; empty if not asked.
        rows_u, rows_v: gradient of `loss` with respect to the rows, (b, d); zeros where they are not used.
        columns_u, columns_v: gradient with respect to the columns, (B, d), or None where they are not used.
        temperature: derivative of `loss` with respect to tau0, float64 scalar, or None if not asked.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    rows_u: Tensor
    rows_v: Tensor
    columns_u: Tensor | None
    columns_v: Tensor | None
    temperature: Tensor | None


def value_and_gradient(
    objective: Objective,
    rows_u: Tensor,
    rows_v: Tensor,
    columns_u: Tensor,
    columns_v: Tensor,
    first_row: int,
    labels: Tensor | None = None,
    parts: bool = True,
    supervisor: Supervisor | None = None,
    temperature: bool = True,
    log_normaliser: Tensor | None = None,
) -> FieldResult:
    """Sum of the losses of b consecutive samples of the global batch, and all its gradients, without
    autograd.

    The result is a function of the arguments alone, bit for bit: no rank, world size or thread count enters,
    beyond what the matrix product of the backend makes of them.

    Args:
        objective: what to compute.
        rows_u, rows_v: embeddings (b, d) of both views of samples first_row..first_row + b - 1, of unit norm if the
            affinity asks for it; float32 or float64 (computed in this precision), bfloat16 or float16 (in float32).
        columns_u, columns_v: embeddings (B, d) of the whole global batch, B >= 2.
        first_row: index of the first of these samples in the global batch.
        labels: (B,) integers of the whole global batch, for objectives that need them.
        parts: whether to fill `parts`, which costs a few more passes over a strip.
        supervisor: p of these rows, for an objective whose supervisor is "rows"; None: the identity.
        temperature: whether to fill `temperature`, which costs a strip where the affinity links.
        log_normaliser: for normaliser="field" and rows that are not the whole batch: see `field_normaliser`.

    Raises:
        ValueError: if labels are missing, shapes or dtypes disagree, the rows do not lie within the batch, or the
            normaliser of the field is missing.
    """
    whole = {"u": rows_u, "v": rows_v}, {"u": columns_u, "v": columns_v}
    with torch.no_grad():
        field, columns = _of_whole_columns(objective, *whole, first_row, labels, parts, supervisor, temperature)
        if objective.normaliser == "field":
            if log_normaliser is None and len(rows_u) < len(columns_u):
                raise ValueError("normaliser='field' needs log_normaliser, unless the rows are the whole batch")
            field.normalise_by(
                field_normaliser(field.log_sum(columns)[None], len(rows_u) * len(objective.slices))
                if log_normaliser is None
                else log_normaliser
            )
        found = torch.zeros_like(columns)
        field.fused(columns, found)
        field.release()
        if field.pooled_gradient is not None:
            add_through_pool(objective, columns, field.pooled_gradient, found)
        home = dict(zip(objective.column_views, found.unbind(), strict=True))
        return FieldResult(
            loss=field.loss(),
            parts=field.parts() if parts else {},
            rows_u=field.gradients["u"],
            rows_v=field.gradients["v"],
            columns_u=home.get("u"),
            columns_v=home["v"],
            temperature=field.temperature_gradient() if temperature else None,
        )


def log_sum(
    objective: Objective,
    rows_u: Tensor,
    rows_v: Tensor,
    columns_u: Tensor,
    columns_v: Tensor,
    first_row: int,
) -> Tensor:
    """log of the sum of exp(l / tau) over the columns of consecutive rows, float64 scalar; arguments as for
    `value_and_gradient`."""
    with torch.no_grad():
        whole = {"u": rows_u, "v": rows_v}, {"u": columns_u, "v": columns_v}
        anyone = replace(objective, supervisor="rows")  # the sums do not depend on p
        field, columns = _of_whole_columns(anyone, *whole, first_row)
        return field.log_sum(columns)


def field_normaliser(log_sums: Tensor, rows: int) -> Tensor:
    """log(Z / R): what every row is normalised by where the field is one distribution.

    Args:
        log_sums: (k,), `log_sum` of parts of the batch, together all of it, in an order that does not change.
        rows: R, rows of all matrices: B for one, 2B for two.
    """
    return torch.logsumexp(log_sums, 0) - math.log(rows)


def _of_whole_columns(
    objective: Objective,
    rows: dict[str, Tensor],
    columns: dict[str, Tensor],
    first_row: int,
    labels: Tensor | None = None,
    parts: bool = False,
    supervisor: Supervisor | None = None,
    temperature: bool = False,
) -> tuple[FieldRows, Tensor]:
    """Rows, and the columns (V, B, d) of the whole batch, which are there at once."""
    _require_matching(rows["u"], rows["v"], columns["u"], columns["v"])
    dtype, names = computing_dtype(rows["u"].dtype), objective.column_views
    block = torch.stack([columns[n].to(dtype) for n in names]) if len(names) > 1 else columns["v"].to(dtype)[None]
    batch, pooled = block.shape[1], objective.affinity.pool(block, block.shape[0] * block.shape[1])
    return FieldRows(objective, rows, batch, first_row, batch, labels, parts, supervisor, temperature, pooled), block


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

    Attributes:
        gradients: of `loss` with respect to the rows, by view, (b, d) in the computing dtype.
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
        self.gradients = {name: torch.zeros_like(x) for name, x in self._rows.items()}
        self.pooled_gradient = torch.zeros_like(pooled) if pooled is not None and self._affinity.pools else None
        self._by_temperature = torch.zeros((), dtype=torch.float64, device=device) if temperature else None
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
        return torch.logsumexp(torch.cat([self._kernel.row_log_sums(sums) for sums in self._sums]), 0)

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
        for piece, sums in zip(self.objective.slices, self._sums, strict=True):
            if len(piece.columns) == len(columns):
                flat, flat_home = columns.flatten(0, 1), None if home is None else home.flatten(0, 1)
            else:
                view = self.objective.column_views.index(piece.columns)
                flat, flat_home = columns[view], None if home is None else home[view]
            if self._affinity.lifts:
                self._visit_lifted(piece, sums, walk, flat, first_column, flat_home)
            else:
                self._visit(piece, sums, walk, flat, first_column, flat_home)

    def release(self) -> None:
        """Release the workspace of the visits; a further visit allocates it again."""
        self._kernel.release()

    def loss(self) -> Tensor:
        """Sum of the row losses, float64 scalar."""
        pieces = zip(self.objective.slices, self._sums, strict=True)
        return torch.stack([p.weight * self._kernel.row_loss(sums).sum() for p, sums in pieces]).sum()

    def parts(self) -> dict[str, Tensor]:
        """Sums of the rows' parts by name, float64 scalars."""
        pieces = zip(self.objective.slices, self._sums, strict=True)
        found = [[p.weight * part.sum() for part in self._kernel.row_parts(sums)] for p, sums in pieces]
        totals = [torch.stack(values).sum() for values in zip(*found, strict=True)]
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
            return self._by_temperature / -self.objective.temperature
        inner = [(self._rows[name] * g).sum(dtype=torch.float64) for name, g in self.gradients.items()]
        return torch.stack(inner).sum() / -self.objective.temperature

    def _visit_lifted(
        self, piece: Slice, sums: RowSums, walk: Walk, columns: Tensor, first_column: int, home: Tensor | None
    ) -> None:
        """`_visit` with the columns' lift before it, and the way back through the lift after it."""
        views = [self.objective.column_views.index(name) for name in piece.columns]
        lifted = self._affinity.lift_columns(columns, self._pooled, views)
        gradient = None if home is None else torch.zeros_like(lifted)
        self._visit(piece, sums, walk, lifted, first_column, gradient)
        if home is not None and gradient is not None:
            by_pool = self._affinity.columns_back(lifted, gradient, home, self._pooled, views)
            if self.pooled_gradient is not None and by_pool is not None:
                self.pooled_gradient[views] += by_pool

    def _visit(
        self, piece: Slice, sums: RowSums, walk: Walk, columns: Tensor, first_column: int, home: Tensor | None
    ) -> None:
        """One visit by lifted columns; `home` gets the gradient with respect to them."""
        affinity, scale = self._affinity, self._kernel.scale
        rows, gradients = self._rows[piece.rows], self.gradients[piece.rows]
        by_temperature = self._by_temperature if home is not None and affinity.lifts else None
        workspace = rows.new_empty(self._panel_rows, self._width)
        logits = rows.new_empty(self._strip_rows, self._width) if affinity.links else workspace
        for start in range(0, self._b, self._panel_rows):
            stop = min(start + self._panel_rows, self._b)
            mine = affinity.lift_rows(rows[start:stop], self._pooled)
            panel = torch.mm(mine if affinity.links else mine * scale, columns.T, out=workspace[: stop - start])
            for first in range(start, stop, self._strip_rows):
                last = min(first + self._strip_rows, stop)
                place = Place(piece, first, self._first_row + first - first_column, first_column, self._block)
                strip = panel[first - start : last - start]
                if not affinity.links:
                    walk(strip, sums.rows(first, last), place)
                    continue
                part = logits[: last - first]
                affinity.link(strip, part, self._taking_part, scale)
                before = None if by_temperature is None else part.clone()
                walk(part, sums.rows(first, last), place)
                if by_temperature is not None and before is not None:
                    by_temperature.add_(before.mul_(part).sum(dtype=torch.float64), alpha=piece.weight)
                if home is not None:
                    torch.div(part, strip, out=strip)
            if home is None:
                continue
            factor = piece.weight * scale * affinity.slope
            if affinity.lifts:
                found = torch.mm(panel, columns).mul_(factor)
                if by_temperature is not None and not affinity.links:
                    by_temperature.add_((mine * found).sum(dtype=torch.float64))
                gradients[start:stop] += affinity.rows_back(mine, found)
            else:
                gradients[start:stop].addmm_(panel, columns, alpha=factor)
            home.addmm_(panel.T, mine, alpha=factor)

    def _at_uniform(self) -> Tensor:
        """Sum of the row losses if every learned row were uniform: log N - H(p(t)), summed over levels."""
        kept, total = 1.0, torch.zeros((), dtype=torch.float64, device=self._rows["u"].device)
        for alpha in self.objective.couplings or (0.0,):
            kept *= 1 - alpha
            total += (math.log(self._taking_part) - self._supervisor.mixed_entropy(self._taking_part, kept)).sum()
        return total


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
    buffers = min(most, max(most // 4, 2 * rows * columns))
    return panel, min(panel, max(1, buffers // ((2 * depth + 2) * columns)))


def _require_matching(rows_u: Tensor, rows_v: Tensor, columns_u: Tensor, columns_v: Tensor) -> None:
    named = {"rows_u": rows_u, "rows_v": rows_v, "columns_u": columns_u, "columns_v": columns_v}
    if any(x.dim() != 2 for x in named.values()) or rows_u.shape != rows_v.shape or columns_u.shape != columns_v.shape:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in named.items())
        raise ValueError(f"rows must be (b, d) and columns (B, d), alike in both views; got {shapes}")
    if rows_u.shape[1] != columns_u.shape[1] or len({(x.dtype, x.device) for x in named.values()}) > 1:
        kinds = ", ".join(f"{name} d = {x.shape[1]} {x.dtype} on {x.device}" for name, x in named.items())
        raise ValueError(f"rows and columns must agree in d, dtype and device; got {kinds}")
    if len(rows_u) == 0 or len(columns_u) < 2:
        raise ValueError(f"need at least one row and two samples, got {len(rows_u)} and {len(columns_u)}")


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
