"""Where things lie in the field: the matrices that an objective is made of, and a strip's place in one of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Slice:
    """One matrix of rows against columns that an objective is made of.

    Attributes:
        rows: the view of the rows, "u" or "v".
        columns: the views of the columns, in order: "u", "v" or "uv".
        weight: share of this matrix in the loss of a sample.
        positive: the view (position in `columns`) that holds the positive column of sample i, at index i.
        excluded: the view that holds the excluded self column of sample i (k != i in eq. 4), or None.
    """

    rows: str
    columns: str
    weight: float
    positive: int
    excluded: int | None


@dataclass(frozen=True)
class Place:
    """Position in the field of a strip of r rows and n columns.

    Attributes:
        piece: the matrix of rows and columns that it is part of.
        first: number of the strip's first row among the b rows.
        offset: the first row's sample minus the block's first; a block holds the samples of all b rows or of none.
        first_column, block: the samples of the block of columns, the same in each of its views.
    """

    piece: Slice
    first: int
    offset: int
    first_column: int
    block: int

    @property
    def positive(self) -> int | None:
        """Column of the first row's positive (the next row's is one further), None if it is not in this strip."""
        return self._column(self.piece.positive)

    @property
    def excluded(self) -> int | None:
        """The same for the excluded self column."""
        return None if self.piece.excluded is None else self._column(self.piece.excluded)

    def _column(self, view: int) -> int | None:
        return self.offset + view * self.block if 0 <= self.offset < self.block else None
