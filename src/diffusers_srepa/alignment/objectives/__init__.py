"""Alignment objectives, grouped by what they compare; `base.py` states their common interface."""
