"""Frozen vision encoders: one table of families, one class that turns images into patch tokens."""
