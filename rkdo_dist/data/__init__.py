"""Data: shards and their index, the order of samples, the stream of micro-batches, views."""
