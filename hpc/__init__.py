"""The runtime: what happens around a training step (recipes, data, the loop, rank 0's duties)."""
