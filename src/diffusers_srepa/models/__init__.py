"""Transformers of this package."""
