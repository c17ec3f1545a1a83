"""Training: configuration, method, loop, checkpoints, validation, publishing."""
