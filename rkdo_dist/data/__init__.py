"""Floor 3: which samples make a step, and their bytes (order, prepare, stream, views)."""
