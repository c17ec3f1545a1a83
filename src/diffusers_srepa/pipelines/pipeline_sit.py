"""Class-conditional image generation with a SiT velocity model.

The file imports nothing from its package, so that a Hub repository can carry it as code. Scheduler and transformer are
therefore annotated with their base classes, and latent scale and shift are written out here once more.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import SanaLoraLoaderMixin
from diffusers.models import AutoencoderKL, ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor


OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# Timesteps are float32, so a time on the edge of the guidance interval may miss it by a rounding error.
TIME_TOLERANCE = 1e-6

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from diffusers_srepa import SiTPipeline

        >>> pipe = SiTPipeline.from_pretrained("me/sit-xl-2-srepa", dtype=torch.bfloat16).to("cuda")
        >>> generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        >>> images = pipe(
        ...     class_labels=["golden retriever", 88], guidance_scale=1.8, guidance_interval=(0.0, 0.7),
        ...     num_inference_steps=250, generator=generators,
        ... ).images
        ```
"""


class SiTPipeline(DiffusionPipeline, SanaLoraLoaderMixin):
    r"""
    Pipeline for class-conditional image generation with a SiT transformer, with or without REG's class token.

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods
    implemented for all pipelines (saving, running on a particular device, etc.). The pipeline also loads, saves and
    fuses LoRA weights of the transformer.

    Time runs from t = 1 (noise) to t = 0 (data); the transformer predicts d x_t / d t and gets timesteps `1000 * t`.
    Any scheduler for flow prediction works. One whose `set_timesteps` takes `sigmas` gets `linspace(1, 1/N, N)`, the
    even grid of SiT's and REPA's Euler sampler; any other, such as `FlowMatchHeunDiscreteScheduler` and
    `FlowMatchEulerMaruyamaScheduler`, uses the grid of its own. Multistep solvers assume the linear path; a model of
    the cosine path is sampled by Euler, Heun, or Euler-Maruyama with `path_type="cosine"`.

    Args:
        transformer ([`SiTTransformer2DModel`]):
            The velocity model.
        vae ([`AutoencoderKL`] or `None`):
            The autoencoder of the latents; `None` for a model of pixels in [-1, 1].
        scheduler ([`FlowMatchEulerMaruyamaScheduler`] or a flow-matching scheduler of diffusers):
            The sampler.
        id2label (`dict[str, str]`, *optional*):
            Class names by class number (as a string, for JSON); several synonyms are separated by commas.
        guidance_channels (`int`, *optional*):
            How many of the first channels guidance acts on, unless a call says otherwise; all by default. The official
            SiT checkpoints were sampled with 3 (SiT, `forward_with_cfg`).
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents", "class_token"]

    def __init__(
        self,
        transformer: ModelMixin,
        vae: AutoencoderKL | None,
        scheduler: SchedulerMixin,
        id2label: dict[str, str] | None = None,
        guidance_channels: int | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.register_to_config(id2label=_check_id2label(id2label), guidance_channels=guidance_channels)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent pixel, along each side."""
        if getattr(self, "vae", None) is None:
            return 1
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def guidance_interval(self) -> tuple[float, float]:
        return self._guidance_interval

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether guidance is on; at a given step it also needs the time to lie in the guidance interval."""
        return self._guidance_scale > 1

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        return self._attention_kwargs

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        r"""
        Class numbers of class names.

        Args:
            label (`str` or `list[str]`):
                One name or several: any of the synonyms in `id2label`, or a whole entry; case does not matter.

        Returns:
            `list[int]`: one number for each name.

        Raises:
            ValueError: the pipeline has no names, or a name is unknown or belongs to several classes.
        """
        names = [label] if isinstance(label, str) else list(label)
        if not self.config.id2label:
            raise ValueError(
                f"The class name {names[0]!r} cannot be looked up because the pipeline has no `id2label`: pass class "
                "numbers, or give the pipeline its `id2label`."
            )
        ids_by_name: dict[str, list[int]] = {}
        for number, entry in self.config.id2label.items():
            for name in {entry, *entry.split(",")}:
                ids_by_name.setdefault(_normalize_name(name), []).append(int(number))
        return [_find_label_id(name, ids_by_name) for name in names]

    def class_numbers(self, class_labels: int | str | Sequence[Any] | torch.Tensor | np.ndarray) -> list[int]:
        r"""
        Class numbers of numbers, names, sequences of them, or an integer array or tensor; flattened.

        Raises:
            ValueError: a label is neither number nor name, or there is no such class.
        """
        if isinstance(class_labels, (torch.Tensor, np.ndarray)):
            class_labels = class_labels.tolist()
        if isinstance(class_labels, str):
            class_labels = self.get_label_ids(class_labels)
        if isinstance(class_labels, (list, tuple)):
            return [number for label in class_labels for number in self.class_numbers(label)]
        if isinstance(class_labels, bool) or not isinstance(class_labels, numbers.Integral):
            raise ValueError(
                f"`class_labels` has {class_labels!r} of type {type(class_labels).__name__}, but must hold integers "
                "or class names."
            )
        number, last = int(class_labels), self.transformer.config.num_classes - 1
        if not 0 <= number <= last:
            raise ValueError(f"`class_labels` has {number}, but the transformer knows classes 0 to {last}.")
        return [number]

    def check_inputs(
        self,
        label_ids: Sequence[int],
        num_images_per_prompt: int,
        height: int,
        width: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        output_type: str,
    ) -> None:
        """Checks what a call asks for; each failure is a `ValueError` of one sentence."""
        if not label_ids:
            raise ValueError("`class_labels` is empty, but at least one class is needed.")
        _check_positive_integer("num_images_per_prompt", num_images_per_prompt)
        step = self.vae_scale_factor * self.transformer.config.patch_size
        for name, size in (("height", height), ("width", width)):
            _check_positive_integer(name, size)
            if size % step:
                raise ValueError(f"`{name}` is {size} pixels, but must be divisible by {step}.")

        batch_size = len(label_ids) * num_images_per_prompt
        sources = generator if isinstance(generator, list) else [generator] * batch_size
        if generator is not None and not all(isinstance(source, torch.Generator) for source in sources):
            raise ValueError(f"`generator` is {generator!r}, but must be a `torch.Generator` or a list of them.")
        if len(sources) != batch_size:
            raise ValueError(
                f"`generator` is a list of {len(sources)}, but the call makes {batch_size} images: pass one for each "
                "image, or a single generator."
            )
        if latents is not None:
            expected = self._latent_shape(batch_size, height, width)
            if not isinstance(latents, torch.Tensor) or not latents.is_floating_point():
                raise ValueError("`latents` must be a floating point tensor.")
            if latents.shape != expected:
                raise ValueError(f"`latents` has shape {tuple(latents.shape)}, but the call needs {expected}.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` is {output_type!r}, but must be one of {', '.join(OUTPUT_TYPES)}.")
        channels = self.transformer.config.in_channels
        if self.vae is None and output_type == "pil" and channels not in (1, 3):
            raise ValueError(
                f"Images of {channels} channels have no PIL form: set `output_type` to 'pt', or give a `vae`."
            )

    def check_loop(
        self,
        num_inference_steps: int,
        sigmas: Sequence[float] | None,
        callback: Callable[..., dict[str, Any]] | None,
        callback_tensor_inputs: Sequence[str],
    ) -> None:
        """Checks steps and callback of a call; each failure is a `ValueError` of one sentence."""
        if sigmas is None:
            _check_positive_integer("num_inference_steps", num_inference_steps)
        elif not _is_sigma_grid(sigmas):
            raise ValueError("`sigmas` must be a list of decreasing numbers in (0, 1].")
        if callback is not None and not callable(callback):
            raise ValueError(f"`callback_on_step_end` is {callback!r}, but must be callable.")
        unknown = [name for name in callback_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {unknown[0]!r}, but may hold "
                f"{' and '.join(map(repr, self._callback_tensor_inputs))} only."
            )

    def check_guidance(
        self,
        guidance_scale: float,
        guidance_interval: tuple[float, float],
        guidance_channels: int | None,
        class_token_guidance_scale: float,
    ) -> None:
        """Checks the guidance of a call; each failure is a `ValueError` of one sentence."""
        scales = {"guidance_scale": guidance_scale, "class_token_guidance_scale": class_token_guidance_scale}
        for name, value in scales.items():
            if not _is_number(value) or value < 0:
                raise ValueError(f"`{name}` is {value!r}, but must be a finite number of at least 0.")
        if guidance_scale > 1:
            self._null_class_label()
        if (
            not isinstance(guidance_interval, (tuple, list))
            or len(guidance_interval) != 2
            or not all(map(_is_number, guidance_interval))
            or not 0 <= guidance_interval[0] <= guidance_interval[1] <= 1
        ):
            raise ValueError(
                f"`guidance_interval` is {guidance_interval!r}, but must be two times (low, high) with "
                "0 <= low <= high <= 1."
            )
        channels = self.transformer.config.in_channels
        if guidance_channels is not None:
            _check_positive_integer("guidance_channels", guidance_channels)
            if guidance_channels > channels:
                raise ValueError(
                    f"`guidance_channels` is {guidance_channels}, but the latents have {channels} channels."
                )
        if class_token_guidance_scale > 0 and self.transformer.config.get("class_token_dim") is None:
            raise ValueError(
                f"`class_token_guidance_scale` is {class_token_guidance_scale}, but the transformer has no class "
                "token (its `class_token_dim` is None): set it to 0."
            )

    def check_components(self) -> None:
        """Checks that transformer, autoencoder and scheduler fit together; else a `ValueError` of one sentence."""
        transformer, scheduler = self.transformer.config, self.scheduler.config
        out_channels = transformer.get("out_channels") or transformer.in_channels
        if out_channels != transformer.in_channels:
            raise ValueError(
                f"The transformer has {out_channels} output channels for {transformer.in_channels} input channels, "
                "but a velocity needs as many: set its `out_channels` to None."
            )
        if self.vae is not None and self.vae.config.latent_channels != transformer.in_channels:
            raise ValueError(
                f"The autoencoder has {self.vae.config.latent_channels} latent channels, but the transformer has "
                f"{transformer.in_channels} (its `in_channels`): use the autoencoder of the transformer's latents."
            )
        prediction_type = scheduler.get("prediction_type", "flow_prediction")
        if prediction_type != "flow_prediction" or not scheduler.get("use_flow_sigmas", True):
            raise ValueError(
                f"The scheduler {type(self.scheduler).__name__} is not set up for flow prediction, but SiT predicts a "
                "flow: use a flow-matching scheduler, or rebuild this one by `from_config(..., "
                "prediction_type='flow_prediction', use_flow_sigmas=True, flow_shift=1.0)` if it has these options."
            )
        if scheduler.get("use_dynamic_shifting"):
            raise ValueError(
                "The scheduler's `use_dynamic_shifting` is on, but SiT has no shift that depends on the resolution: "
                "rebuild it by `from_config(..., use_dynamic_shifting=False)`."
            )
        if scheduler.num_train_timesteps != transformer.get("timestep_scale", scheduler.num_train_timesteps):
            raise ValueError(
                f"The scheduler's `num_train_timesteps` is {scheduler.num_train_timesteps}, but the transformer "
                f"divides timesteps by {transformer.timestep_scale} (its `timestep_scale`): the two must be equal."
            )

    def prepare_latents(
        self,
        batch_size: int,
        height: int,
        width: int,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The initial noise, shape `(batch_size, in_channels, h, w)`: float32, or float64 if `latents` are."""
        if latents is None:
            shape = self._latent_shape(batch_size, height, width)
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        return latents.to(device, torch.promote_types(latents.dtype, torch.float32))

    def prepare_class_token(
        self, latents: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None
    ) -> torch.Tensor | None:
        """REG's initial class token, shape `(batch_size, class_token_dim)`; `None` for a transformer without one."""
        dim = self.transformer.config.get("class_token_dim")
        if dim is None:
            return None
        shape = (latents.shape[0], dim)
        token = randn_tensor(shape, generator=generator, device=latents.device, dtype=torch.float32)
        return token.to(latents.dtype)

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | torch.Tensor,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_channels: int | None = None,
        class_token_guidance_scale: float = 0.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        r"""
        Generates images.

        Args:
            class_labels (`int`, `str`, a sequence of them, or an integer `torch.Tensor`):
                Class numbers or names, one for each image (times `num_images_per_prompt`).
            height (`int`, *optional*):
                Height in pixels; by default that of `latents`, else the transformer's `sample_size`. It must be
                divisible by the patch size times the autoencoder's scale factor.
            width (`int`, *optional*):
                Width in pixels, likewise.
            num_inference_steps (`int`, defaults to 50):
                The number of steps; the papers of REPA and sREPA use 250.
            sigmas (`Sequence[float]`, *optional*):
                Decreasing times in (0, 1] at which the model is called, instead of `num_inference_steps` even ones;
                the scheduler's `set_timesteps` must take them.
            guidance_scale (`float`, defaults to 1.0):
                The weight w of classifier-free guidance, d = d_u + w (d_c - d_u). At 1 and below it is off.
            guidance_interval (`tuple[float, float]`, defaults to `(0.0, 1.0)`):
                The times t, both ends included, at which guidance acts (t = 1 is noise). Outside it only the
                conditional pass runs. The second half of a Heun step follows the time at which the step began.
            guidance_channels (`int`, *optional*):
                Guidance acts on this many of the first channels; the others keep their conditional value. By default
                the pipeline's own `guidance_channels`.
            class_token_guidance_scale (`float`, defaults to 0.0):
                For a transformer with REG's class token, the weight of guidance of that token wherever the latents are
                guided; at 0 the token keeps its conditional velocity.
            num_images_per_prompt (`int`, defaults to 1):
                The number of images of each label; they follow each other in the output.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                The source of all noise: one generator for the batch, or one for each image, which makes an image
                independent of the rest of its batch.
            latents (`torch.Tensor`, *optional*):
                The initial noise, shape `(B, in_channels, h, w)`. The state of the sampler is float64 if they are,
                else float32; the model runs in its own dtype.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`, `"np"` (float32 `(B, H, W, C)` in [0, 1]), `"pt"` (`(B, C, H, W)` in [0, 1]) or `"latent"`
                (the scaled latents).
            return_dict (`bool`, defaults to `True`):
                Whether to return an [`ImagePipelineOutput`] instead of a tuple.
            attention_kwargs (`dict`, *optional*):
                Passed to the transformer; `{"scale": s}` scales LoRA weights.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipeline, step, timestep, tensors)` after every step; returns the tensors to go on
                with. It may set `pipeline._guidance_scale`, or `pipeline._interrupt` to stop early.
            callback_on_step_end_tensor_inputs (`Sequence[str]`, defaults to `("latents",)`):
                The names of the tensors that the callback gets: `"latents"`, `"class_token"`.

        Examples:

        Returns:
            [`ImagePipelineOutput`] or `tuple`: the images, or a tuple that holds them.

        Raises:
            ValueError: an argument is wrong, or the components do not fit together.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if guidance_channels is None:
            guidance_channels = self.config.guidance_channels
        height, width = self._image_size(height, width, latents)
        label_ids = self.class_numbers(class_labels)
        self.check_components()
        self.check_inputs(label_ids, num_images_per_prompt, height, width, generator, latents, output_type)
        self.check_loop(num_inference_steps, sigmas, callback_on_step_end, callback_on_step_end_tensor_inputs)
        self.check_guidance(guidance_scale, guidance_interval, guidance_channels, class_token_guidance_scale)

        self._guidance_scale = guidance_scale
        self._guidance_interval = (guidance_interval[0], guidance_interval[1])
        self._guidance_channels = guidance_channels
        self._class_token_guidance_scale = class_token_guidance_scale
        self._attention_kwargs = attention_kwargs
        self._current_timestep = None
        self._interrupt = False

        device = self._execution_device
        num_inference_steps = self._set_timesteps(num_inference_steps, sigmas, device)
        labels = torch.tensor(label_ids, device=device).repeat_interleave(num_images_per_prompt)
        latents = self.prepare_latents(len(labels), height, width, device, generator, latents)
        class_token = self.prepare_class_token(latents, generator)

        latents = self._denoise(
            latents,
            class_token,
            labels,
            num_inference_steps,
            generator,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )

        images = latents if output_type == "latent" else self._decode(latents)
        images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        return ImagePipelineOutput(images=images)

    def _denoise(
        self,
        latents: torch.Tensor,
        class_token: torch.Tensor | None,
        labels: torch.Tensor,
        num_inference_steps: int,
        generator: torch.Generator | list[torch.Generator] | None,
        callback_on_step_end: Callable[..., dict[str, Any]] | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> torch.Tensor:
        """The sampling loop, from noise to latents."""
        scheduler = self.scheduler
        scheduler.set_begin_index(0)
        # A scheduler counts its steps and may keep past outputs, so the class token needs one of its own.
        token_scheduler = copy.deepcopy(scheduler) if class_token is not None else None
        step_kwargs: dict[str, Any] = {"return_dict": False}
        if "generator" in inspect.signature(scheduler.step).parameters:
            step_kwargs["generator"] = generator

        timesteps = scheduler.timesteps
        times = [timestep / scheduler.config.num_train_timesteps for timestep in timesteps.tolist()]
        num_warmup_steps = max(len(timesteps) - num_inference_steps * scheduler.order, 0)
        self._num_timesteps = len(timesteps)
        guided = False

        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = t
                # The second evaluation of a Heun step is guided as the first one was (REPA, `euler_sampler`).
                if getattr(scheduler, "state_in_first_order", True) and guided != self._is_guided(times[i]):
                    guided = not guided
                    # What a cache holds belongs to a batch of another size.
                    self.transformer._reset_stateful_cache()

                velocity, token_velocity = self._predict_velocity(latents, class_token, t, labels, guided)
                latents = scheduler.step(velocity, t, latents, **step_kwargs)[0]
                if token_scheduler is not None:
                    class_token = token_scheduler.step(token_velocity, t, class_token, **step_kwargs)[0]

                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "class_token": class_token}
                    callback_kwargs = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    callback_outputs = callback_on_step_end(self, i, t, callback_kwargs)
                    latents = callback_outputs.pop("latents", latents)
                    class_token = callback_outputs.pop("class_token", class_token)

                if i == len(timesteps) - 1 or ((i + 1) > num_warmup_steps and (i + 1) % scheduler.order == 0):
                    progress_bar.update()

        self._current_timestep = None
        return latents

    def _predict_velocity(
        self,
        latents: torch.Tensor,
        class_token: torch.Tensor | None,
        timestep: torch.Tensor,
        labels: torch.Tensor,
        guided: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The velocities of latents and class token, in the dtype of the latents."""
        copies = 2 if guided else 1
        if guided:
            # Unconditional first, as diffusers' caches expect it.
            labels = torch.cat([torch.full_like(labels, self._null_class_label()), labels])

        dtype = self.transformer.dtype
        hidden_states = torch.cat([latents] * copies).to(dtype)
        model_kwargs: dict[str, Any] = {}
        if class_token is not None:
            model_kwargs["class_token"] = torch.cat([class_token] * copies).to(dtype)
        if self.transformer.training and self.transformer.null_class_label is not None:
            # In train mode the transformer would replace labels by the null class at random.
            model_kwargs["class_drop_mask"] = torch.zeros_like(labels, dtype=torch.bool)
        with self.transformer.cache_context("cond_uncond"):
            output = self.transformer(
                hidden_states=hidden_states,
                timestep=timestep.expand(hidden_states.shape[0]),
                class_labels=labels,
                attention_kwargs=self.attention_kwargs,
                return_dict=False,
                **model_kwargs,
            )
        velocity = output[0].to(latents.dtype)
        token_velocity = None if class_token is None else output[1].to(latents.dtype)
        if not guided:
            return velocity, token_velocity
        velocity = _guide(velocity, self._guidance_scale, self._guidance_channels)
        if token_velocity is not None:
            scale = self._class_token_guidance_scale
            token_velocity = _guide(token_velocity, scale) if scale > 0 else token_velocity.chunk(2)[1]
        return velocity, token_velocity

    def _is_guided(self, time: float) -> bool:
        low, high = self._guidance_interval
        return self.do_classifier_free_guidance and low - TIME_TOLERANCE <= time <= high + TIME_TOLERANCE

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images in [-1, 1] of scaled latents."""
        if self.vae is None:
            return latents
        scaling_factor, shift_factor = self.vae.config.scaling_factor, self.vae.config.shift_factor
        if scaling_factor is not None:
            latents = latents / scaling_factor
        if shift_factor is not None:
            latents = latents + shift_factor
        return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]

    def _set_timesteps(self, num_inference_steps: int, sigmas: Sequence[float] | None, device: torch.device) -> int:
        """Sets the scheduler's grid and returns its number of steps."""
        takes_sigmas = "sigmas" in inspect.signature(self.scheduler.set_timesteps).parameters
        if sigmas is not None and not takes_sigmas:
            raise ValueError(
                f"`sigmas` was passed, but {type(self.scheduler).__name__} has a grid of its own: pass "
                "`num_inference_steps` instead."
            )
        if not takes_sigmas:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
            return num_inference_steps
        grid = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps) if sigmas is None else np.asarray(sigmas)
        # UniPC computes with the array that it gets; others take a list, and some of them nothing else.
        as_array = self.scheduler.config.get("use_flow_sigmas")
        self.scheduler.set_timesteps(sigmas=grid if as_array else grid.tolist(), device=device)
        if sigmas is None and self.scheduler.sigmas[-1] > 0:
            # It wants the end of the grid, t = 0, to be passed too; the grid of its own has it.
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        return len(grid)

    def _image_size(self, height: int | None, width: int | None, latents: torch.Tensor | None) -> tuple[int, int]:
        """Height and width in pixels, with the defaults of a call filled in."""
        size = self.transformer.config.sample_size
        rows, columns = (size, size) if isinstance(size, int) else size
        if isinstance(latents, torch.Tensor) and latents.ndim == 4:
            rows, columns = latents.shape[2:]
        height = rows * self.vae_scale_factor if height is None else height
        width = columns * self.vae_scale_factor if width is None else width
        return height, width

    def _latent_shape(self, batch_size: int, height: int, width: int) -> tuple[int, int, int, int]:
        factor = self.vae_scale_factor
        return (batch_size, self.transformer.config.in_channels, height // factor, width // factor)

    def _null_class_label(self) -> int:
        label = self.transformer.null_class_label
        if label is None:
            raise ValueError(
                "Guidance needs a null class, but the transformer was built without one (its `class_dropout_prob` is "
                "0): set `guidance_scale` to 1."
            )
        return label

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> SiTPipeline:
        """As the base class does; see [`DiffusionPipeline.from_pipe`]."""
        # The base class carries over a model only if its exact class is annotated, which this file cannot name.
        kwargs.setdefault("transformer", pipeline.transformer)
        return super().from_pipe(pipeline, **kwargs)


def _guide(velocity: torch.Tensor, scale: float, channels: int | None = None) -> torch.Tensor:
    """Classifier-free guidance of a batch of unconditional, then conditional velocities; see `__call__`."""
    unconditional, conditional = velocity.chunk(2)
    guided = unconditional + scale * (conditional - unconditional)
    if channels is None:
        return guided
    return torch.cat([guided[:, :channels], conditional[:, channels:]], dim=1)


def _check_id2label(id2label: Mapping[Any, Any] | None) -> dict[str, str] | None:
    """`id2label` with the keys that JSON allows."""
    if id2label is None:
        return None
    for number, name in id2label.items():
        if not str(number).isdecimal() or not isinstance(name, str):
            raise ValueError(f"`id2label` has {number!r}: {name!r}, but must map class numbers to names.")
    return {str(int(number)): name for number, name in id2label.items()}


def _normalize_name(name: str) -> str:
    return " ".join(name.split()).casefold()


def _find_label_id(name: str, ids_by_name: Mapping[str, list[int]]) -> int:
    ids = sorted(set(ids_by_name.get(_normalize_name(name), [])))
    if len(ids) == 1:
        return ids[0]
    if ids:
        raise ValueError(
            f"The class name {name!r} belongs to the classes {' and '.join(map(str, ids))}: pass the number instead."
        )
    matches = difflib.get_close_matches(_normalize_name(name), ids_by_name, n=3)
    hint = (
        f"did you mean {' or '.join(map(repr, matches))}?" if matches else "see `pipe.config.id2label` for all names."
    )
    raise ValueError(f"There is no class named {name!r}: {hint}")


def _check_positive_integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"`{name}` is {value!r}, but must be a positive integer.")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_sigma_grid(sigmas: Sequence[float]) -> bool:
    grid = np.asarray(sigmas, dtype=np.float64)
    return grid.ndim == 1 and len(grid) > 0 and bool(np.all((grid > 0) & (grid <= 1)) and np.all(np.diff(grid) < 0))
