"""What is known about the terms of often used encoders, autoencoders and datasets, for the model card.

Each note repeats what the repository's own card said when the note was written; the card tells readers to check there.
"""

from __future__ import annotations

import re

from diffusers_srepa.publishing.redaction import public_id


_NOTES = (
    (r"facebook/dinov2-(with-registers-)?(small|base|large|giant)", "Apache-2.0 by its card"),
    (
        r"facebook/dinov3-.+",
        "under the [DINOv3 License](https://ai.meta.com/resources/models-and-libraries/dinov3-license/), whose "
        "conditions must be accepted before the download",
    ),
    (r"nyu-visionx/moco-v3-.+", "CC-BY-NC-4.0 by its card, so not for commercial use"),
    (r"stabilityai/sd-vae-ft-(mse|ema)", "MIT by its card"),
    (
        r"ILSVRC/imagenet-1k",
        "[ImageNet's terms of access](https://www.image-net.org/download.php) allow non-commercial research and "
        "education only, and the copyright of the images stays with their owners; whether that binds weights trained "
        "on them is for you to settle",
    ),
)


def licence_note(repository: str | None) -> str | None:
    """What to know about the terms of a repository of the Hub; None where nothing is known, or for a local path."""
    for pattern, note in _NOTES:
        if repository is not None and re.fullmatch(pattern, repository):
            return note
    return None


def describe_source(name: str | None, noun: str, prefix: str = "") -> dict[str, str | None]:
    """How a card names a dataset or model of the Hub or a local path (`link`), and what its terms are (`note`).

    Args:
        name (`str`, *optional*): Hub id or local path.
        noun (`str`): what it is, such as "autoencoder"; a local one is called "a local autoencoder".
        prefix (`str`): `"datasets/"` for a dataset, the part of its address before the id.
    """
    repo_id = public_id(name)
    link = f"[{repo_id}](https://huggingface.co/{prefix}{repo_id})" if repo_id else f"a local {noun}"
    return {"link": link, "note": licence_note(repo_id)}
