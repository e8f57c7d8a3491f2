"""What goes wrong with data."""


class DataError(ValueError):
    """Something is wrong with data or its index; the message names the file (shard, key, offset) and what
    to do."""


class Unreachable(DataError):
    """Data that could not be read now, whatever its content: never skipped, as another rank may have read
    it."""
