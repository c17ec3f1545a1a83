"""Pictures of a run: loss curves, sample grids, similarity maps of student and teacher tokens."""
