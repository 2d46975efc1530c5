"""The training loop and what it stands on: optimiser, schedule, checkpoints, ranks, the run directory."""
