"""Latents of diffusers' `AutoencoderKL`, the space of SiT, REPA and the paper (sd-vae-ft-mse)."""

from __future__ import annotations

import hashlib
import json
import logging
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import AutoencoderKL

from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.hub_errors import FETCH_ERRORS, explain_failure, is_missing_file
from diffusers_srepa.latents.latent_space import LatentSpace


logger = logging.getLogger(__name__)

# What decodes, or only says how latents are scaled, does not change the moments. sd-vae-ft-mse and sd-vae-ft-ema share
# their encoder, and so a cache made with one serves the other.
_DECODER_PREFIXES = ("decoder.", "post_quant_conv.")
_DECODER_CONFIG = {
    "force_upcast",
    "latents_mean",
    "latents_std",
    "out_channels",
    "sample_size",
    "scaling_factor",
    "shift_factor",
    "up_block_types",
    "use_post_quant_conv",
}


class AutoencoderKLLatents(LatentSpace):
    """A frozen `AutoencoderKL` as a latent space; it encodes and decodes in its own dtype, outside autocast.

    Args:
        vae (`AutoencoderKL`): put into evaluation mode, in place, and used without gradient.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        model: Any = vae
        # Not requires_grad_(False): CPU convolutions then take another kernel, even under no_grad, and a reloaded
        # pipeline would decode to other last bits than the run's own validation.
        self.vae = model.eval()
        config = model.config
        if config.latents_mean is not None or config.latents_std is not None:
            logger.warning(
                "latents_mean and latents_std of the autoencoder are not used: latents are scaled by its "
                "scaling_factor and shift_factor."
            )
        self.latent_channels = config.latent_channels
        self.downsample_factor = 2 ** (len(config.block_out_channels) - 1)
        self.scaling_factor = config.scaling_factor
        self.shift_factor = config.shift_factor or 0.0

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Load an autoencoder from a folder or the Hub.

        Args:
            name_or_path (`str`): repository or folder of an autoencoder, or of a pipeline that has one in `vae`.
            subfolder (`str`, *optional*): folder inside the repository; by default the repository itself, else `vae`.
            dtype (`torch.dtype`, *optional*): precision of encoding and decoding, by default float32.
            revision, token, cache_dir, local_files_only: as in `diffusers`.

        Raises:
            ConfigurationError: there is no autoencoder, another class of autoencoder, or one that cannot be loaded.
        """
        where: dict[str, Any] = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
        }
        config, subfolder = _find_config(str(name_or_path), subfolder, where)
        class_name = config.get("_class_name")
        if class_name != AutoencoderKL.__name__:
            raise ConfigurationError(
                f"{name_or_path} holds {class_name or 'a model without a class name'}, but an AutoencoderKL is "
                "needed: change `name_or_path` or `subfolder`."
            )
        try:
            vae, loaded = AutoencoderKL.from_pretrained(
                name_or_path,
                subfolder=subfolder,
                torch_dtype=dtype or torch.float32,
                output_loading_info=True,
                **where,
            )
        except (*FETCH_ERRORS, RuntimeError, TypeError) as error:
            raise ConfigurationError(
                f"the autoencoder {name_or_path} {explain_failure(error, revision=revision)}."
            ) from error
        missing = sorted(loaded["missing_keys"])
        if missing:
            raise ConfigurationError(
                f"the weights of the autoencoder {name_or_path} lack {len(missing)} tensors, the first is "
                f"{missing[0]}: change `name_or_path`."
            )
        return cls(vae)

    @cached_property
    def encoder_id(self) -> str:  # type: ignore[override]
        """Class name and a hash of the encoder: its configuration and its weights in the dtype they are loaded in."""
        digest = hashlib.blake2b(digest_size=8)
        config = {
            name: value
            for name, value in self.vae.config.items()
            if not name.startswith("_") and name not in _DECODER_CONFIG
        }
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.vae.state_dict().items()):
            if name.startswith(_DECODER_PREFIXES):
                continue
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return f"{type(self.vae).__name__}-{digest.hexdigest()}"

    def to(self, device: torch.device | str) -> Self:
        self.vae.to(device)
        return self

    def _encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(images.device.type, enabled=False):
            posterior = self.vae.encode((images.float() * 2 - 1).to(self.vae.dtype)).latent_dist
        return posterior.mean, posterior.std

    def _decode(self, unscaled: torch.Tensor) -> torch.Tensor:
        with torch.autocast(unscaled.device.type, enabled=False):
            return self.vae.decode(unscaled.to(self.vae.dtype)).sample


def _find_config(name: str, subfolder: str | None, where: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The autoencoder's configuration, and the subfolder that holds it."""
    candidates = [subfolder] if subfolder is not None else [None, "vae"]
    missing, failures = [], []
    for candidate in candidates:
        folder = Path(name) / (candidate or "")
        # diffusers falls back to the parent folder when a local subfolder has no configuration.
        if Path(name).is_dir() and not (folder / AutoencoderKL.config_name).is_file():
            missing.append(folder)
            continue
        try:
            return AutoencoderKL.load_config(name, subfolder=candidate, **where), candidate
        except FETCH_ERRORS as error:
            if is_missing_file(error):
                missing.append(folder)
            else:
                failures.append(error)
    if failures:
        reason = explain_failure(failures[0], revision=where["revision"])
        raise ConfigurationError(f"the autoencoder {name} {reason}.") from failures[0]
    raise ConfigurationError(
        f"no autoencoder was found at {name} ({missing[0]} has no {AutoencoderKL.config_name}): change `name_or_path`."
    )
