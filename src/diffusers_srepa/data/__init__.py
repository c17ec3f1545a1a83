"""Datasets of images, their order, and caches of their latents."""
