"""Alignment objectives, one per file; `base.py` states their common interface."""
