"""The samplers that a pipeline can be written with, by the name that options use."""

from __future__ import annotations

from typing import Any

from diffusers_srepa.errors import ConfigurationError, close_matches


SCHEDULER_TITLES = {"euler-maruyama": "Euler-Maruyama (SDE)", "euler": "Euler (ODE)"}
"""What each sampler is called in a model card."""


def build_scheduler(name: str, path: str = "linear") -> Any:
    """The scheduler called `name` for a model that was trained on `path`, `"linear"` or `"cosine"`."""
    if name not in SCHEDULER_TITLES:
        raise ConfigurationError(f"there is no `scheduler` {name!r}, {close_matches(name, SCHEDULER_TITLES)}")
    if name == "euler":
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler()
    from diffusers_srepa.schedulers.scheduling_flow_match_euler_maruyama import FlowMatchEulerMaruyamaScheduler

    return FlowMatchEulerMaruyamaScheduler(path_type=path)
