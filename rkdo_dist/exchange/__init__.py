"""Floor 2: everything that travels between ranks (torch.distributed only)."""
