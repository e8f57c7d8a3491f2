"""Floor 5: frozen features and the scores computed from them."""
