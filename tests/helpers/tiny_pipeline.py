"""A pipeline of real components, small enough that a whole sampling run takes milliseconds."""

from typing import Any

import torch

from diffusers_srepa.pipelines.hub import SiTPipeline
from diffusers_srepa.schedulers.scheduling_flow_match_euler_maruyama import FlowMatchEulerMaruyamaScheduler
from tests.helpers.tiny_autoencoder import tiny_autoencoder
from tests.helpers.tiny_sit import tiny_sit


ID2LABEL = {
    "0": "tench, Tinca tinca",
    "1": "golden retriever",
    "2": "crane",
    "3": "Labrador retriever",
    "4": "crane",
    "5": "great white shark, white shark, man-eater",
}


def tiny_pipeline(**overrides: Any) -> SiTPipeline:
    """The pipeline for 16 px images of ten classes; any argument of `SiTPipeline` may be replaced.

    A latent pixel is 2 x 2 pixels, and scale and shift of the latents differ from the neutral ones.
    """
    components: dict[str, Any] = {"id2label": ID2LABEL, **overrides}
    if "transformer" not in components:
        components["transformer"] = tiny_sit()
    if "vae" not in components:
        components["vae"] = tiny_autoencoder(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            scaling_factor=0.3,
            shift_factor=0.1,
        ).eval()
    if "scheduler" not in components:
        components["scheduler"] = FlowMatchEulerMaruyamaScheduler()
    pipe = SiTPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]
