"""The latents of a dataset on disk: their format, writing and reading."""
