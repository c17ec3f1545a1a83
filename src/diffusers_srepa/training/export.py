"""The finished pipeline of a run: folders that `SiTPipeline.from_pretrained` loads, projectors beside it, a card."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors import SafetensorError

from diffusers_srepa.alignment.aligned_denoiser import AlignedDenoiser
from diffusers_srepa.latents.autoencoder_kl import AutoencoderKLLatents
from diffusers_srepa.latents.latent_space import LatentSpace
from diffusers_srepa.models.transformer_sit import SiTTransformer2DModel
from diffusers_srepa.pipelines.pipeline_sit import SiTPipeline
from diffusers_srepa.schedulers.scheduling_flow_match_euler_maruyama import FlowMatchEulerMaruyamaScheduler
from diffusers_srepa.training.checkpoint_folder import TEMPORARY_PREFIX, flush
from diffusers_srepa.training.checkpoints import CheckpointError
from diffusers_srepa.training.config import TrainingConfig


def build_scheduler(config: TrainingConfig) -> Any:
    """The scheduler that `sampling.scheduler` names, on the path that was trained."""
    if config.sampling.scheduler == "euler":
        return FlowMatchEulerDiscreteScheduler()
    return FlowMatchEulerMaruyamaScheduler(path_type=config.flow.path)


def build_pipeline(
    transformer: SiTTransformer2DModel,
    codec: LatentSpace,
    id2label: dict[int, str] | None,
    config: TrainingConfig,
) -> SiTPipeline:
    """A pipeline around the live transformer; it samples with whatever weights the transformer has at the time."""
    return SiTPipeline(
        transformer=transformer,
        vae=_publishable_vae(codec, config),
        scheduler=build_scheduler(config),
        id2label=None if id2label is None else {str(index): name for index, name in id2label.items()},
        guidance_channels=config.sampling.guidance_channels,
    )


def _publishable_vae(codec: LatentSpace, config: TrainingConfig) -> Any:
    """The autoencoder in float32; one that encodes in half precision is loaded again, so that nothing is rounded."""
    if not isinstance(codec, AutoencoderKLLatents):
        return None
    if codec.vae.dtype == torch.float32:
        return codec.vae
    latents = config.latents
    full = AutoencoderKLLatents.from_pretrained(latents.vae, subfolder=latents.subfolder, revision=latents.revision)
    return full.to(codec.vae.device).vae


def save_finished(pipeline: SiTPipeline, student: AlignedDenoiser, output_dir: Path) -> None:
    """Write the pipeline, and the projectors for further aligned training, with the weights that they have now.

    Everything is written beside its place first and then moved, `model_index.json` last: a folder that has this file
    has a whole pipeline.

    Raises:
        CheckpointError: the disk is full or fails otherwise; the run can be resumed, and writes the pipeline then.
    """
    temporary = output_dir / f"{TEMPORARY_PREFIX}pipeline"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        pipeline.save_pretrained(temporary)
        student.save_projectors(temporary / "projectors")
        flush(temporary)
        # An earlier end of the run has left one; until the last part is in place there is no whole pipeline.
        (output_dir / "model_index.json").unlink(missing_ok=True)
        for part in sorted(temporary.iterdir(), key=lambda path: path.name == "model_index.json"):
            if part.is_dir():
                shutil.rmtree(output_dir / part.name, ignore_errors=True)
            os.replace(part, output_dir / part.name)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"the finished pipeline could not be written to {output_dir} ({reason}): make room, then run again with "
            "--resume_from_checkpoint latest, which writes it."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
