"""Communication between ranks: sums in a fixed order, columns of the field, rows by owner."""
