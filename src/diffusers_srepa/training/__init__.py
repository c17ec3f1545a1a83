"""Training a method on a dataset: loop, checkpoints, and what a run writes."""
