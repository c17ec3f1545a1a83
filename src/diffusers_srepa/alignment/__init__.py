"""Representation alignment: taps, projectors, objectives and their weights."""
