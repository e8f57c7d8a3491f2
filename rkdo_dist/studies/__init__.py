"""Floor 7: what is read from finished run directories."""
