"""Reading the output of an inner module of a student or a teacher by a forward hook, one forward pass at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from diffusers_srepa.errors import ConfigurationError, close_matches


BLOCK_LISTS = ("transformer_blocks", "blocks")
"""Names under which transformers keep their list of blocks."""


class FeatureTap:
    """Keeps the output of one submodule from the moment it is armed until it is popped, both in the same forward.

    The tap is itself the hook, so a deep copy of the module carries a tap of its own that shares nothing with this
    one; copies and pickles are disarmed and empty. A forward that nobody armed the tap for (sampling, the
    recomputation of gradient checkpointing) passes by without a trace. Attach it before `torch.compile` first runs
    the module: a hook that comes later never fires there.

    Usage::

        tap = FeatureTap(transformer, "transformer_blocks.7")
        with tap:
            velocity = transformer(x_t, timestep, class_labels).sample
            hidden_states = tap.pop()

    `torch.compile(fullgraph=True)` over a whole model whose tapped block is gradient-checkpointed is refused by
    dynamo, which allows no side effect inside a checkpoint: compile the blocks instead (`compile_repeated_blocks`),
    leave `fullgraph` out, or set `torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint`.

    Args:
        module (`nn.Module`): the model; wrappers of `torch.compile`, DDP and PEFT are looked through.
        path (`str`): dotted path of the submodule whose output is read, for instance `"transformer_blocks.7"`; with
            `":1"` behind it, entry 1 of the tuple that it returns, as for blocks with a text and an image stream.

    Raises:
        ConfigurationError: there is no such submodule; close names or the valid range of a block list are given.
    """

    def __init__(self, module: nn.Module, path: str) -> None:
        self.path = path
        self._armed = False
        self._ran_with_grad = False
        self._feature: torch.Tensor | None = None
        name, self._index = split_index(path)
        self._handle = find_submodule(module, name).register_forward_hook(self)

    def __enter__(self) -> FeatureTap:
        self.arm()
        return self

    def __exit__(self, *exception: object) -> None:
        self.disarm()

    def arm(self) -> None:
        """Keep the next output."""
        self._armed, self._feature = True, None

    def disarm(self) -> None:
        """Keep nothing, and let go of what was kept."""
        self._armed, self._feature = False, None

    def pop(self) -> torch.Tensor:
        """The output of the submodule since the tap was armed; the tap is then disarmed and empty.

        Returns:
            `torch.Tensor`: the first tensor of the output, as the submodule returned it, gradient included.

        Raises:
            ConfigurationError: the submodule did not run, or ran without gradient although gradients are enabled here.
        """
        feature, ran_with_grad = self._feature, self._ran_with_grad
        self.disarm()
        if feature is None:
            raise ConfigurationError(
                f"the tapped module {self.path!r} did not run in this forward: tap a module that it calls, and attach "
                "the tap before the first compiled call."
            )
        if torch.is_grad_enabled() and not ran_with_grad:
            raise ConfigurationError(
                f"the tapped module {self.path!r} ran without gradient, so no alignment could reach it: use gradient "
                "checkpointing with use_reentrant=False, or pop inside the same torch.no_grad."
            )
        return feature

    def remove(self) -> None:
        """Take the hook off the submodule."""
        self.disarm()
        self._handle.remove()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The hook."""
        if not self._armed:
            return
        if self._feature is not None:
            raise ConfigurationError(
                f"the tapped module {self.path!r} ran twice in one forward: tap a module that runs once."
            )
        self._feature = select_tensor(output, self.path, self._index)
        self._ran_with_grad = torch.is_grad_enabled()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_armed": False, "_feature": None}


def split_index(path: str) -> tuple[str, int | None]:
    """`"blocks.7:1"` as `("blocks.7", 1)`, `"blocks.7"` as `("blocks.7", None)`."""
    if not isinstance(path, str):
        raise ConfigurationError(f"the tap is {path!r}, but must be a path such as 'transformer_blocks.7'.")
    name, colon, index = path.partition(":")
    if colon and not index.isdecimal():
        raise ConfigurationError(
            f"the tap {path!r} ends with {index!r}, but behind the colon stands the number of an entry of the output, "
            "counted from 0."
        )
    return name, int(index) if colon else None


def select_tensor(output: Any, path: str, index: int | None) -> torch.Tensor:
    """The tensor that a module returns, or one entry of the tuple that it returns, by default the first."""
    entries = output if isinstance(output, tuple | list) else (output,)
    if index is not None and index >= len(entries):
        raise ConfigurationError(
            f"the tapped module of {path!r} returns {len(entries)} entries: change the tap's number."
        )
    streams = [entry for entry in entries if isinstance(entry, torch.Tensor) and entry.ndim == 3]
    if index is None and len(streams) > 1:
        raise ConfigurationError(
            f"the tapped module {path!r} returns {len(streams)} tensors of tokens, such as text and image streams: "
            f"say which one, as in '{path}:1' for the second."
        )
    value = entries[index or 0] if entries else None
    if not isinstance(value, torch.Tensor):
        raise ConfigurationError(
            f"the tapped module {path!r} returns a {type(value).__name__}, but must return a tensor or a tuple that "
            "starts with one: tap another module."
        )
    return value


def unwrap_module(module: nn.Module) -> nn.Module:
    """The module inside the wrappers of `torch.compile`, (distributed) data parallelism and PEFT."""
    while True:
        if "_orig_mod" in module._modules:
            inner = module._modules["_orig_mod"]
        elif isinstance(module, DistributedDataParallel | DataParallel):
            inner = module.module
        elif hasattr(type(module), "get_base_model"):
            # A PeftModel; importing peft only to ask would cost seconds.
            inner = module.get_base_model()  # type: ignore[operator]
        else:
            return module
        assert isinstance(inner, nn.Module)
        module = inner


def find_submodule(module: nn.Module, path: str) -> nn.Module:
    """The submodule of `module` at a dotted `path`, wrappers at every level looked through."""
    current = unwrap_module(module)
    root = type(current).__name__
    if not path:
        raise ConfigurationError(f"the tap's path is empty: name a submodule of {root}, like 'transformer_blocks.7'.")
    seen = ""
    for name in path.split("."):
        if isinstance(current, nn.ModuleList) and name not in current._modules:
            raise ConfigurationError(
                f"the tap {path!r} is outside {root}, where {seen!r} has the entries 0 to {len(current) - 1}: change "
                "the `tap` (or the `depth`, which counts from 1)."
            )
        child = getattr(current, name, None)
        if not isinstance(child, nn.Module):
            known = [child_name for child_name, _ in current.named_children()]
            where = f"{seen!r} of {root}" if seen else root
            hint = close_matches(name, known).rstrip("?") if known else "it has no submodules at all"
            raise ConfigurationError(f"the tap {path!r} does not exist, as {where} has no {name!r}: {hint}.")
        seen = f"{seen}.{name}" if seen else name
        current = unwrap_module(child)
    return current


def block_list(module: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and modules of a transformer's list of blocks.

    Raises:
        ConfigurationError: the model has no list of blocks of a known name.
    """
    model = unwrap_module(module)
    for name in BLOCK_LISTS:
        blocks = getattr(model, name, None)
        if isinstance(blocks, nn.ModuleList):
            return name, blocks
    raise ConfigurationError(
        f"{type(model).__name__} has no list of blocks named {' or '.join(map(repr, BLOCK_LISTS))}: give the path "
        "of a module as `tap` instead of a depth."
    )
