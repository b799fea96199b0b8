"""Training runs: the loop, checkpoints, metrics, evaluation, pictures."""
