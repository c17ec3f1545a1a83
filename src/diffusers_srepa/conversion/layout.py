"""What a checkpoint is and how big, read off the names and shapes of its tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from diffusers_srepa.conversion import names
from diffusers_srepa.conversion.projectors import has_irepa_names, split_projectors
from diffusers_srepa.conversion.read import RunFacts, Weights, name_some, read_arguments
from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.models.transformer_sit import SIT_PRESETS


FORMATS = {"sit": "SiT", "repa": "REPA", "irepa": "iREPA", "reg": "REG"}
PATH_TYPES = ("linear", "cosine")

_HEADS = {
    size["num_attention_heads"] * size["attention_head_dim"]: size["num_attention_heads"]
    for size in SIT_PRESETS.values()
}
_PATCH_WEIGHT = "x_embedder.proj.weight"
_TABLE = "y_embedder.embedding_table.weight"
_CLASS_TOKEN_WEIGHT = "cls_projectors2.weight"
_MLP_WEIGHT = "blocks.0.mlp.fc1.weight"
_NEEDED = (_PATCH_WEIGHT, _TABLE, names.POSITIONS, f"{names.FINAL_LAYER}.weight", _MLP_WEIGHT)


@dataclass(frozen=True)
class Choices:
    """What a user says about a checkpoint; None where it is to be found out.

    Args:
        format (`str`, *optional*): "sit", "repa", "irepa" or "reg".
        path_type (`str`, *optional*): "linear" or "cosine".
        num_attention_heads (`int`, *optional*): heads of the transformer.
        num_classes (`int`, *optional*): classes, the null class not counted.
        sample_size (`tuple[int, int]`, *optional*): height and width of the latents.
    """

    format: str | None = None
    path_type: str | None = None
    num_attention_heads: int | None = None
    num_classes: int | None = None
    sample_size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Layout:
    """What a checkpoint is.

    Args:
        format (`str`): "sit", "repa", "irepa" or "reg".
        config (`dict[str, Any]`): keyword arguments of `SiTTransformer2DModel`.
        final_channels (`int`): output channels of the checkpoint; twice `in_channels` if it also predicts a sigma.
        path_type (`str`): "linear" or "cosine".
        projectors (`dict[int, dict[str, torch.Tensor]]`): the weights of its projectors by number.
        encoder_depth (`int`, *optional*): block that the projectors read, counted from 1, if the file shows it.
    """

    format: str
    config: dict[str, Any]
    final_channels: int
    path_type: str
    projectors: dict[int, dict[str, torch.Tensor]]
    encoder_depth: int | None = None

    @property
    def dim(self) -> int:
        """Width of a token."""
        return self.config["num_attention_heads"] * self.config["attention_head_dim"]

    @property
    def model_name(self) -> str:
        """The official name of the size, such as "SiT-XL/2", or "SiT" for another size."""
        for name, size in SIT_PRESETS.items():
            if all(self.config[key] == value for key, value in size.items()):
                return name
        return "SiT"


def read_layout(weights: Weights, choices: Choices) -> Layout:
    """Recognise a checkpoint; afterwards `weights.state` holds the backbone alone, without legacy names.

    Raises:
        ConfigurationError: names or shapes that are none of the four formats, or a question that the tensors cannot
            answer; the message names the option that does.
    """
    state = weights.state
    facts = read_arguments(weights.arguments)
    legacy_depth = names.rename_legacy_blocks(state)
    projectors = split_projectors(state)
    sizes = _read_sizes(state)
    names.check_shapes(state, names.expected_shapes(**sizes))
    class_token_dim, patch_size = sizes["class_token_dim"], sizes["patch_size"]
    final_channels = sizes["final_rows"] // patch_size**2
    has_sigma = final_channels != sizes["in_channels"]
    formats = _possible_formats(class_token_dim is not None, has_sigma, projectors, legacy_depth is not None)
    num_classes, dropout = _classes(sizes["table_rows"], facts, choices.num_classes)
    num_tokens = sizes["num_positions"] - (class_token_dim is not None)
    config = {
        "sample_size": _sample_size(num_tokens, patch_size, choices.sample_size),
        "patch_size": patch_size,
        "in_channels": sizes["in_channels"],
        "num_layers": sizes["num_layers"],
        **_heads(sizes["dim"], sizes["head_dim"], choices.num_attention_heads),
        "mlp_ratio": _mlp_ratio(sizes["mlp_dim"], sizes["dim"]),
        "num_classes": num_classes,
        "class_dropout_prob": dropout,
        "qk_norm": sizes["head_dim"] is not None,
        "class_token_dim": class_token_dim,
    }
    return Layout(
        format=_format(formats, facts, choices.format),
        config=config,
        final_channels=final_channels,
        path_type=_path_type(facts, choices.path_type),
        projectors=projectors,
        encoder_depth=(legacy_depth or facts.encoder_depth) if projectors else None,
    )


def _read_sizes(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The arguments of `expected_shapes`, each from one tensor."""
    _check_needed(state)
    patch_shape = tuple(state[_PATCH_WEIGHT].shape)
    if len(patch_shape) != 4 or patch_shape[2] != patch_shape[3]:
        raise ConfigurationError(
            f"the tensor {_PATCH_WEIGHT} has shape {patch_shape}, but must be (D, C, p, p): the checkpoint is none of "
            "SiT, REPA, iREPA and REG."
        )
    dim, in_channels, patch_size, _ = patch_shape
    final_weight = f"{names.FINAL_LAYER}.weight"
    for name, ndim in ((final_weight, 2), (names.POSITIONS, 3), (_TABLE, 2), (_MLP_WEIGHT, 2)):
        if state[name].ndim != ndim:
            raise ConfigurationError(
                f"the tensor {name} has shape {tuple(state[name].shape)}, but must have {ndim} dimensions."
            )
    final_rows = state[final_weight].shape[0]
    rows = patch_size * patch_size * in_channels
    if final_rows not in (rows, 2 * rows):
        raise ConfigurationError(
            f"the tensor {final_weight} has {final_rows} rows, but for patches of {patch_size} x {patch_size} and "
            f"{in_channels} channels it must have {rows}, or {2 * rows} with a sigma."
        )
    return {
        "dim": dim,
        "num_layers": names.count_blocks(state),
        "mlp_dim": state[_MLP_WEIGHT].shape[0],
        "patch_size": patch_size,
        "in_channels": in_channels,
        "final_rows": final_rows,
        "table_rows": state[_TABLE].shape[0],
        "num_positions": state[names.POSITIONS].shape[1],
        "head_dim": _qk_norm_width(state),
        "class_token_dim": _class_token_dim(state),
    }


def _possible_formats(
    has_class_token: bool, has_sigma: bool, projectors: Mapping[int, Mapping[str, torch.Tensor]], is_legacy: bool
) -> dict[str, str]:
    """The formats that the tensors allow, each with the reason that excludes the others."""
    if has_class_token:
        return {"reg": "it has a class token (cls_projectors2)"}
    if has_sigma:
        return {"sit": "its final layer also predicts a sigma"}
    if has_irepa_names(projectors):
        return {"irepa": "its projectors have iREPA's names"}
    if projectors:
        # Older iREPA runs have REPA's names; both are converted alike.
        return dict.fromkeys(("repa", "irepa"), "it has projectors")
    if is_legacy:
        return {"repa": "it has decoder_blocks"}
    return dict.fromkeys(("sit", "repa", "irepa"), "it has neither projectors nor a class token")


def _format(possible: Mapping[str, str], facts: RunFacts, chosen: str | None) -> str:
    if chosen not in (None, *FORMATS):
        raise ConfigurationError(f"`format` is {chosen!r}, but must be one of {', '.join(FORMATS)}.")
    if chosen is not None:
        if chosen not in possible:
            raise ConfigurationError(
                f"`format` is {chosen}, but the checkpoint is {' or '.join(possible)}: "
                f"{next(iter(possible.values()))}."
            )
        if "sit" in possible and facts.original is not None and (facts.original == "sit") != (chosen == "sit"):
            raise ConfigurationError(
                f"`format` is {chosen}, but the arguments stored in the checkpoint are those of {facts.original}'s "
                "trainer: leave the option out."
            )
        return chosen
    if len(possible) == 1 or "sit" not in possible:
        return next(iter(possible))
    if facts.original is None:
        raise ConfigurationError(
            "the checkpoint may be of SiT or of REPA, whose tensors have the same names and shapes when there are no "
            "projectors and no sigma, while their time runs in opposite directions: say which by `format` sit or "
            "`format` repa."
        )
    return facts.original


def _path_type(facts: RunFacts, chosen: str | None) -> str:
    if chosen not in (None, *PATH_TYPES):
        raise ConfigurationError(f"`path_type` is {chosen!r}, but must be one of {', '.join(PATH_TYPES)}.")
    if chosen is not None and facts.path_type not in (None, chosen):
        raise ConfigurationError(
            f"`path_type` is {chosen}, but the run's arguments in the checkpoint say {facts.path_type}: leave the "
            "option out."
        )
    return chosen or facts.path_type or "linear"


def _check_needed(state: Mapping[str, torch.Tensor]) -> None:
    missing = [name for name in _NEEDED if name not in state]
    if not missing:
        return
    if any(name.startswith(("transformer_blocks.", "patch_embed.")) for name in state):
        raise ConfigurationError(
            "the checkpoint has the names of a diffusers transformer, so there is nothing to convert: load its folder "
            "with from_pretrained, or export the folder of its pipeline."
        )
    raise ConfigurationError(
        f"the checkpoint lacks {name_some(missing)}, its names are {name_some(state)}: it is none of SiT, REPA, iREPA "
        "and REG, or not complete."
    )


def _class_token_dim(state: Mapping[str, torch.Tensor]) -> int | None:
    if not any(name.startswith(("cls_projectors2.", "wg_norm.", "final_layer.linear_cls.")) for name in state):
        return None
    weight = state.get(_CLASS_TOKEN_WEIGHT)
    if weight is None or weight.ndim != 2:
        raise ConfigurationError(
            f"the checkpoint has REG's class token, but no matrix {_CLASS_TOKEN_WEIGHT}: it is not complete."
        )
    positions = state[names.POSITIONS]
    if bool(positions[:, 0].count_nonzero()):
        raise ConfigurationError(
            f"the first row of {names.POSITIONS} is not zero, but REG's class token has no position: the checkpoint "
            "is of another model."
        )
    return weight.shape[1]


def _qk_norm_width(state: Mapping[str, torch.Tensor]) -> int | None:
    norms = [value for name, value in state.items() if name.endswith(("attn.q_norm.weight", "attn.k_norm.weight"))]
    return norms[0].shape[0] if norms and norms[0].ndim == 1 else None


def _classes(rows: int, facts: RunFacts, chosen: int | None) -> tuple[int, float]:
    """Number of classes and dropout probability; the last of `rows` is the null class, if there is one."""
    dropout = facts.class_dropout_prob or 0.1
    if chosen is not None:
        if chosen not in (rows, rows - 1):
            raise ConfigurationError(
                f"`num_classes` is {chosen}, but the checkpoint's table has {rows} rows: {rows - 1} classes and the "
                f"null class, or {rows} without one."
            )
        return (chosen, 0.0) if chosen == rows else (chosen, dropout)
    if facts.num_classes == rows:
        return rows, 0.0
    if rows == 1000 and facts.num_classes is None:
        raise ConfigurationError(
            "the checkpoint's label table has 1000 rows, which may be ImageNet's classes without a null class, or 999 "
            "classes with one: say which by `num_classes` 1000 or `num_classes` 999."
        )
    if rows < 2:
        raise ConfigurationError("the checkpoint's label table has 1 row: say by `num_classes` 1 that it is a class.")
    return rows - 1, dropout


def _mlp_ratio(mlp_dim: int, dim: int) -> float:
    """The ratio that the model turns into `mlp_dim` again, although it rounds down."""
    ratio = mlp_dim / dim
    return ratio if int(dim * ratio) == mlp_dim else math.nextafter(ratio, math.inf)


def _heads(dim: int, head_dim: int | None, chosen: int | None) -> dict[str, int]:
    """Heads and their width, which the shapes show only where queries and keys are normalised."""
    if chosen is not None and (chosen < 1 or dim % chosen or (head_dim is not None and chosen * head_dim != dim)):
        must = f"must be {dim // head_dim}" if head_dim else f"must divide the width {dim}"
        raise ConfigurationError(f"`num_attention_heads` is {chosen}, but {must}.")
    heads = chosen if chosen is not None else dim // head_dim if head_dim else _HEADS.get(dim)
    if heads is None or heads < 1 or heads * (dim // heads) != dim:
        raise ConfigurationError(
            f"the checkpoint's width {dim} is none of {', '.join(map(str, sorted(_HEADS)))} (S, B, L, XL), and the "
            "number of heads cannot be seen in its shapes: give it by `num_attention_heads`."
        )
    return {"num_attention_heads": heads, "attention_head_dim": dim // heads}


def _sample_size(num_tokens: int, patch_size: int, chosen: tuple[int, int] | None) -> int | tuple[int, int]:
    """Height and width of the latents; a square where nothing else is said."""
    if chosen is not None:
        height, width = chosen
        is_divided = min(height, width) > 0 and height % patch_size == width % patch_size == 0
        if not is_divided or height * width != num_tokens * patch_size**2:
            raise ConfigurationError(
                f"`sample_size` is {height} x {width}, but the checkpoint has {num_tokens} positions of "
                f"{patch_size} x {patch_size} latent pixels."
            )
        return height if height == width else (height, width)
    side = math.isqrt(max(num_tokens, 0))
    if side < 1 or side * side != num_tokens:
        raise ConfigurationError(
            f"the checkpoint has {num_tokens} positions, which are no square: give height and width of its latents "
            "by `sample_size`."
        )
    return side * patch_size
