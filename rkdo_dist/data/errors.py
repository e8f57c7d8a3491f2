"""Errors of shards, samples and their index."""


class DataError(ValueError):
    """Data or its index cannot be used; the message names the file (shard, key, offset) and what to do."""


class Unreachable(DataError):
    """Data that could not be read now, whatever its content: never skipped, as another rank may have read it."""
