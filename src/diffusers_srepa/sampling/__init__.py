"""Drawing many images from a pipeline."""
