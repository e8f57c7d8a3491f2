"""What a step costs: measured, by formula, and checked before training."""
