"""Reading a checkpoint file without running anything that it holds."""

from __future__ import annotations

import argparse
import io
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from diffusers_srepa.errors import ConfigurationError


_ZIP = b"PK\x03\x04"
# `torch.save` before version 1.6 wrote a bare pickle, which starts with its protocol.
_PICKLE = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
# How PyTorch's restricted unpickler names what it refuses to load or call.
_REFUSED = re.compile(r"(?:GLOBAL|class|function) <?(?:class |function )?'?([A-Za-z_][\w.]*\.\w+)")


def read_checkpoint(path: str | Path) -> Any:
    """The content of a `.pt`, `.pth`, `.bin` or `.safetensors` file, tensors on the CPU.

    Files are told apart by their first bytes, not by their name. PyTorch files are read by `weights_only=True` with
    `argparse.Namespace` as the one class allowed beyond tensors and plain values: the official trainers store their
    arguments as one. Zip files are mapped, so that only what is used comes into memory.

    Args:
        path (`str` or `Path`): the file.

    Returns:
        whatever was saved; a flat dict of tensors for safetensors.

    Raises:
        ConfigurationError: there is no such file, it is empty, truncated or of another kind, or it holds objects that
            only unpickling could restore.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigurationError(
            f"{path} is a folder, but --checkpoint must be a file (.pt, .pth, .bin, .safetensors)."
        )
    if not path.is_file():
        raise ConfigurationError(f"there is no file {path}: change --checkpoint.")
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise ConfigurationError(f"the file {path} is empty: change --checkpoint, or download it again.")
    if head.startswith(_ZIP):
        return _load_torch(path, mmap=True)
    if head.startswith(_PICKLE):
        return _load_torch(path, mmap=False)
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return _load_safetensors(path)
    raise ConfigurationError(
        f"{path} is {_describe(head)}, neither a PyTorch nor a safetensors file: change --checkpoint."
    )


def _load_torch(path: Path, mmap: bool) -> Any:
    try:
        # A file object, because torch.load takes a path that ends in .safetensors for such a file.
        with (
            path.open("rb") as file,
            torch.serialization.safe_globals([argparse.Namespace]),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            source = str(path) if mmap and path.suffix != ".safetensors" else file
            return torch.load(source, map_location="cpu", weights_only=True, mmap=isinstance(source, str))
    except pickle.UnpicklingError as error:
        refused = _REFUSED.search(str(error))
        raise ConfigurationError(_refusal(path, refused[1] if refused else "a pickle of another kind")) from None
    except RuntimeError as error:
        if "TorchScript" in str(error):
            raise ConfigurationError(_refusal(path, "a TorchScript program")) from None
        raise ConfigurationError(_damage(path, error)) from None
    # A damaged pickle stops anywhere in its program, and so with almost any error.
    except Exception as error:
        raise ConfigurationError(_damage(path, error)) from None


def _load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ConfigurationError(_damage(path, error)) from None


def _refusal(path: Path, what: str) -> str:
    return (
        f"{path} holds {what}, which only unpickling could restore, and that can run code from the file: give a "
        "checkpoint of tensors and plain values, such as a file saved by torch.save(model.state_dict())."
    )


def _damage(path: Path, error: Exception) -> str:
    reason = " ".join(str(error).split()).split(". ")[0][:160].rstrip(".: ") or type(error).__name__
    return f"{path} cannot be read ({reason}): it is truncated, damaged or no checkpoint; download it again."


def _describe(head: bytes) -> str:
    text = io.BytesIO(head).read().decode("utf-8", errors="replace")
    # The last character may have been cut in two.
    readable = all(character.isprintable() or character.isspace() for character in text.rstrip("\ufffd"))
    return "a text file" if readable else "a file of an unknown kind"
