"""Pipelines.

diffusers finds the components of a saved pipeline only in modules that are already imported, so this package imports
the modules of model and scheduler before any pipeline module.
"""

from diffusers_srepa.models.transformer_sit import SiTTransformer2DModel
from diffusers_srepa.schedulers.scheduling_flow_match_euler_maruyama import FlowMatchEulerMaruyamaScheduler


__all__ = ["FlowMatchEulerMaruyamaScheduler", "SiTTransformer2DModel"]
