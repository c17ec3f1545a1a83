"""Samplers that diffusers does not have; deterministic sampling uses diffusers' own flow-matching schedulers."""
