"""Whether the shards of a latent cache are what was written.

Hashing a large cache takes minutes, so that a shard is hashed when the cache is first opened, and again when its size
or its time of writing has changed; what was found is remembered in `latents.verified.json` beside the shards.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffusers_srepa.data.latent_cache.layout import CacheLayout, shard_file
from diffusers_srepa.errors import one_line
from diffusers_srepa.files import sha256, write_text


VERIFIED_FILE = "latents.verified.json"


def damaged_shards(
    folder: Path, layout: CacheLayout, checksums: Sequence[str] | None, *, remember: bool = True
) -> dict[int, str]:
    """The shards that are missing, or have another size or content than was written.

    Args:
        folder (`Path`): the cache.
        layout (`CacheLayout`): what it must hold.
        checksums (`Sequence[str]`, *optional*): SHA-256 of every shard; without them sizes alone are compared.
        remember (`bool`): pass over shards whose content was found right before and note those that are found right
            now; otherwise every shard is hashed and nothing is written.

    Returns:
        `dict[int, str]`: what is wrong, by shard.
    """
    before = _read_verified(folder) if remember else {}
    verified: dict[str, Any] = {}
    damaged: dict[int, str] = {}
    for shard in range(layout.num_shards):
        path = shard_file(folder, shard)
        expected = len(layout.rows_of(shard)) * layout.bytes_per_row
        try:
            status = path.stat()
            if status.st_size != expected:
                damaged[shard] = f"{path} has {status.st_size} bytes instead of {expected}"
            elif checksums is not None:
                # Before the content is read: what changes meanwhile is hashed again.
                seen = [status.st_size, status.st_mtime_ns, checksums[shard]]
                if before.get(path.name) != seen and sha256(path) != checksums[shard]:
                    damaged[shard] = f"{path} has other content than was written"
                else:
                    verified[path.name] = seen
        except FileNotFoundError:
            damaged[shard] = f"{path} has 0 bytes instead of {expected}"
        except OSError as error:
            damaged[shard] = f"{path} cannot be read ({one_line(error)})"
    if remember and verified != before:
        # A cache that may only be read is hashed every time.
        with suppress(OSError):
            write_text(folder / VERIFIED_FILE, json.dumps(verified, indent=1))
    return damaged


def _read_verified(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / VERIFIED_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
