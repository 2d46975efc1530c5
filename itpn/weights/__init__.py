"""Weights at the border: released checkpoints in, ours in and out."""
