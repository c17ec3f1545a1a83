"""Any transformer, its taps and its projectors as one trainable module."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusers_srepa.alignment.projectors import read_projector, save_projector
from diffusers_srepa.alignment.term import DEFAULT, FeatureKey, describe_feature, describe_value
from diffusers_srepa.errors import ConfigurationError, close_matches, one_line
from diffusers_srepa.files import check_name
from diffusers_srepa.hooks import FeatureTap, unwrap_module
from diffusers_srepa.tokens import Grid, TokenMap, check_grid


class AlignedDenoiser(nn.Module):
    """Runs a transformer and returns, beside its velocity, the projected tokens of inner modules.

    Transformer and projectors are one module, so that one DDP wrap, one optimiser and one average cover every
    gradient; taps read by forward hooks, so the transformer itself is unchanged, and nothing is added to what its
    `save_pretrained` writes. Build it before `torch.compile`, DDP or FSDP wrap or first run the transformer.
    Projectors run under the caller's autocast, in their own dtype outside of it; their output is cast to float32
    (float64 stays).

    Usage::

        student = AlignedDenoiser(transformer, tap="transformer_blocks.7", projector=MLPProjector(1152, 768))
        velocity, tokens = student(x_t, timestep, class_labels=labels)      # {("default", "default"): TokenMap}

        student = AlignedDenoiser(
            transformer,
            tap={"early": "transformer_blocks.3", "late": "transformer_blocks.9"},
            projector={"dino": MLPProjector(768, 768), "clip": MLPProjector(768, 1024)},
            features=[("early", "dino"), ("late", "clip"), ("late", None)],  # or criterion.features()
        )

    Args:
        transformer (`nn.Module`): any model whose first 4-D input is the noisy image `(B, C, H, W)` and which returns
            the velocity as a tensor, first in a tuple, or as the `sample` of a diffusers output.
        tap (`str` or `Mapping[str, str]`): dotted path of the module to read, or several by name. Read are tokens
            `(B, P + N, D)` or maps `(B, D, h, w)`, as a tensor or first in a tuple.
        projector (`nn.Module` or `Mapping[str, nn.Module]`, *optional*): what is applied to the tokens, or several by
            name; modules that are not of this package are called with plain tokens `(B, P + N, D)`. Without one the
            tokens stay as they are, under the projector name `"default"`.
        features (`Iterable[tuple[str, str | None]]`, *optional*): the pairs (tap, projector) to return, None standing
            for no projector. By default every tap through the one projector, the one tap through every projector, or
            tap and projector of the same name. Projectors and taps that no pair names are frozen and left alone.
        grid (`tuple[int, int]`, *optional*): rows and columns of the student's tokens. By default found from the
            transformer's patch size and the input, or from the input's aspect ratio.
        num_prefix_tokens (`int`, *optional*): tokens before the patch tokens; by default 1 if the transformer's
            configuration has a `class_token_dim`, else 0.

    Raises:
        ConfigurationError: a path that does not exist, unknown names in `features`, or none where they are ambiguous;
            an argument of another type.
    """

    def __init__(
        self,
        transformer: nn.Module,
        tap: str | Mapping[str, str],
        projector: nn.Module | Mapping[str, nn.Module] | None = None,
        features: Iterable[FeatureKey] | None = None,
        grid: Grid | None = None,
        num_prefix_tokens: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(transformer, nn.Module):
            raise ConfigurationError(
                f"the transformer of an AlignedDenoiser is a {type(transformer).__name__}, but must be a torch module."
            )
        self.transformer = transformer
        paths = _tap_paths(tap)
        self.projectors = _module_dict({} if projector is None else projector)
        # Without a projector its name stands for the tokens as they are, so that terms need not know.
        names = list(self.projectors) or [DEFAULT]
        keys = _default_features(list(paths), names) if features is None else _feature_pairs(features)
        self.features = _check_features(keys, list(paths), names)
        self.taps = {name: FeatureTap(transformer, path) for name, path in paths.items()}
        self.grid = None if grid is None else check_grid(grid, "the grid of an AlignedDenoiser")
        self.patch_size = _config_value(transformer, "patch_size")
        self.has_class_token = _config_value(transformer, "class_token_dim") is not None
        self.num_prefix_tokens = int(self.has_class_token) if num_prefix_tokens is None else num_prefix_tokens
        if type(self.num_prefix_tokens) is not int or self.num_prefix_tokens < 0:
            raise ConfigurationError(
                f"num_prefix_tokens of an AlignedDenoiser is {describe_value(num_prefix_tokens)}, but must be a whole "
                "number of at least 0."
            )
        self.stop_features(())

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Run the transformer with its own arguments.

        Returns:
            `(velocity, tokens)`: the velocity `(B, C, H, W)` as the transformer returns it, and a dict from (tap,
            projector) to `TokenMap` in float32. A transformer that returns a class token, as REG's does, adds a third
            entry: `(velocity, tokens, class_token_velocity)`, the last of shape `(B, class_token_dim)`.

        Raises:
            ConfigurationError: a tapped module did not run, or its tokens do not fit a grid.
        """
        try:
            for tap in self.taps.values():
                tap.arm()
            output = self.transformer(*args, **kwargs)
            hidden_states = {name: tap.pop() for name, tap in self.taps.items()}
        finally:
            for tap in self.taps.values():
                tap.disarm()
        image_size = _image_size(args, kwargs)
        token_maps = {name: self._token_map(name, value, image_size) for name, value in hidden_states.items()}
        tokens = {key: self._project(token_maps[key[0]], key[1]) for key in self.features}
        velocity, class_token = _split_output(output, self.has_class_token)
        return (velocity, tokens) if class_token is None else (velocity, tokens, class_token)

    def stop_features(self, keys: Iterable[FeatureKey]) -> None:
        """Compute these features no more, freeze projectors and remove taps that are left without any.

        For terms that have ended. Afterwards DDP wrapper and optimiser groups have to be built anew, since DDP raises
        for parameters without gradient.
        """
        stopped = set(keys)
        self.features = tuple(key for key in self.features if key not in stopped)
        for name in self.projectors:
            if all(projector != name for _, projector in self.features):
                self.projectors[name].requires_grad_(False)
        for name in [name for name in self.taps if all(tap != name for tap, _ in self.features)]:
            self.taps.pop(name).remove()

    def remove_taps(self) -> None:
        """Take all hooks off the transformer; no features are returned from then on."""
        self.stop_features(self.features)

    def saved_parts(self) -> dict[str, nn.Module]:
        """The modules, without wrappers, by the folder that each is saved into: `transformer`, `projectors/<name>`."""
        projectors = {f"projectors/{name}": unwrap_module(module) for name, module in self.projectors.items()}
        return {"transformer": unwrap_module(self.transformer)} | projectors

    def save_projectors(self, folder: str | Path) -> None:
        """Write every projector into `folder/<name>`; one that is no diffusers model as bare safetensors weights."""
        for name, projector in self.projectors.items():
            save_projector(unwrap_module(projector), Path(folder) / name)

    def load_projectors(self, folder: str | Path) -> None:
        """Copy the weights that `save_projectors` wrote into the projectors of the same names.

        Raises:
            ConfigurationError: a projector's folder is missing, or holds another class or other sizes; nothing has
                been changed then.
        """
        projectors = {name: unwrap_module(projector) for name, projector in self.projectors.items()}
        states = {name: read_projector(projector, Path(folder) / name) for name, projector in projectors.items()}
        for name, state in states.items():
            projectors[name].load_state_dict(state)

    def _token_map(self, name: str, hidden_states: torch.Tensor, image_size: Grid | None) -> TokenMap:
        if hidden_states.ndim == 4:
            return TokenMap.from_map(hidden_states)
        if hidden_states.ndim != 3:
            raise ConfigurationError(
                f"the tapped module {self.taps[name].path!r} returns shape {tuple(hidden_states.shape)}, but must "
                "return tokens (B, N, D) or a map (B, D, h, w): tap another module."
            )
        num_tokens = hidden_states.shape[1] - self.num_prefix_tokens
        grid = self.grid or _find_grid(num_tokens, image_size, self.patch_size)
        if grid is None or grid[0] * grid[1] != num_tokens:
            found = "no grid can be found for them" if grid is None else f"the grid is {grid[0]} x {grid[1]}"
            raise ConfigurationError(
                f"the tapped module {self.taps[name].path!r} returns {hidden_states.shape[1]} tokens, of which "
                f"{self.num_prefix_tokens} are prefix tokens, but {found}: set grid or num_prefix_tokens of the "
                "AlignedDenoiser."
            )
        return TokenMap(hidden_states, grid, self.num_prefix_tokens)

    def _project(self, token_map: TokenMap, name: str | None) -> TokenMap:
        if name is None or name not in self.projectors:
            return token_map.float()
        projector = self.projectors[name]
        parameter = next(projector.parameters(), None)
        if parameter is not None:
            token_map = token_map.with_tokens(token_map.tokens.to(parameter.dtype))
        if getattr(projector, "takes_token_map", False):
            return projector(token_map).float()
        projected = projector(token_map.tokens)
        if not isinstance(projected, torch.Tensor) or projected.shape[:-1] != token_map.tokens.shape[:-1]:
            shape = getattr(projected, "shape", None)
            found = f"a {type(projected).__name__}" if shape is None else f"shape {tuple(shape)}"
            raise ConfigurationError(
                f"the projector {name!r} returns {found} for tokens of shape {tuple(token_map.tokens.shape)}, but "
                "must return a tensor of as many tokens: change the projector."
            )
        return token_map.with_tokens(projected).float()


def _tap_paths(tap: Any) -> dict[str, str]:
    paths = {DEFAULT: tap} if isinstance(tap, str) else tap
    is_named = isinstance(paths, Mapping) and all(isinstance(name, str) for name in (*paths, *paths.values()))
    if not is_named:
        raise ConfigurationError(
            f"the tap of an AlignedDenoiser is {describe_value(tap)}, but must be a path such as "
            "'transformer_blocks.7' or a dict {name: path}."
        )
    return dict(paths)


def infer_grid(num_tokens: int, height: int, width: int) -> Grid | None:
    """The only grid (h, w) with `h * w == num_tokens` and `h / w == height / width` exactly, or None."""
    if num_tokens < 1:
        return None
    divisor = math.gcd(height, width)
    rows, columns = height // divisor, width // divisor
    scale = math.isqrt(num_tokens // (rows * columns))
    grid = (rows * scale, columns * scale)
    return grid if grid[0] * grid[1] == num_tokens else None


def _find_grid(num_tokens: int, image_size: Grid | None, patch_size: Any) -> Grid | None:
    """The grid from patch size and input, else from the input's aspect ratio."""
    if image_size is None:
        return None
    if isinstance(patch_size, int):
        grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        if grid[0] * grid[1] == num_tokens:
            return grid
    return infer_grid(num_tokens, *image_size)


def _config_value(module: nn.Module, name: str) -> Any:
    """An entry of a model's configuration, wrappers looked through; None without a configuration or such an entry."""
    config = getattr(unwrap_module(module), "config", None)
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _image_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Grid | None:
    """Height and width of the first 4-D tensor among the transformer's inputs."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.ndim == 4:
            return (value.shape[2], value.shape[3])
    return None


def _split_output(output: Any, has_class_token: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Velocity and class token of what a transformer returns."""
    if isinstance(output, torch.Tensor):
        return output, None
    if isinstance(output, tuple):
        return output[0], output[1] if has_class_token else None
    if hasattr(output, "sample"):
        return output.sample, output.class_token if has_class_token else None
    raise ConfigurationError(
        f"the transformer returns a {type(output).__name__}, but must return a tensor, a tuple that starts with one, "
        "or an output with a `sample`: wrap it in a module that does."
    )


def _module_dict(projector: nn.Module | Mapping[str, nn.Module]) -> nn.ModuleDict:
    """Projectors by name; `nn.ModuleDict` itself is a mapping of modules, not a projector."""
    if not isinstance(projector, nn.Module | Mapping):
        raise ConfigurationError(
            f"the projector of an AlignedDenoiser is a {type(projector).__name__}, but must be a module such as "
            "MLPProjector(1152, 768) or a dict {name: module}."
        )
    modules = projector if isinstance(projector, nn.ModuleDict | Mapping) else {DEFAULT: projector}
    for name in modules:
        check_name("the name of a projector", name)
    try:
        return modules if isinstance(modules, nn.ModuleDict) else nn.ModuleDict(modules)
    except (KeyError, TypeError) as error:
        raise ConfigurationError(
            f"the projectors {list(modules)} cannot be registered ({one_line(error)}): give modules, and other names."
        ) from None


def _feature_pairs(features: Any) -> list[FeatureKey]:
    """A list of (tap, projector) pairs; a string or a single pair is an iterable too, but of something else."""
    pairs = features if isinstance(features, str) or not isinstance(features, Iterable) else list(features)
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        raise ConfigurationError(
            f"the features of an AlignedDenoiser are {describe_value(features)}, but must be a list of (tap, "
            "projector) pairs such as [('default', 'default')]."
        )
    return [(tap, projector) for tap, projector in pairs]


def _default_features(taps: list[str], projectors: list[str]) -> list[FeatureKey]:
    if len(projectors) == 1 or len(taps) == 1:
        return [(tap, projector) for tap in taps for projector in projectors]
    if set(taps) == set(projectors):
        return [(name, name) for name in taps]
    if not taps and not projectors:
        return []
    raise ConfigurationError(
        f"the taps {taps} and the projectors {projectors} can be combined in several ways: give features as a list of "
        "(tap, projector) pairs."
    )


def _check_features(keys: list[FeatureKey], taps: list[str], projectors: list[str]) -> tuple[FeatureKey, ...]:
    for tap, projector in keys:
        for kind, name, known in (("tap", tap, taps), ("projector", projector, projectors)):
            if name is not None and name not in known:
                hint = close_matches(name, known).rstrip("?") if known else f"there is no {kind} at all"
                raise ConfigurationError(
                    f"the feature {describe_feature((tap, projector))} names an unknown {kind}: {hint}."
                )
    return tuple(dict.fromkeys(keys))
