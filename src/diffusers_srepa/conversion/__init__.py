"""Conversion of official checkpoints of SiT, REPA, iREPA and REG to pipelines, and back."""
