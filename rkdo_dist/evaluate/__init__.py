"""Evaluation: frozen features and the scores computed from them."""
