"""Publishing a pipeline: its model card, what of it may be seen by anybody, and the Hub."""
