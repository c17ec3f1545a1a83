"""LayerSync: an early layer of the student aligned with a later one, with no teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffusers_srepa.alignment.objectives.cosine import CosineAlignment


@dataclass(frozen=True)
class LayerSyncAlignment(CosineAlignment):
    """Mean over all tokens of `-cos(early_i, late_i)`, per sample; in [-1, 1].

    Haghighi et al., arXiv 2510.12581: the term's tap is the early layer, its target a `Tap` on the late one, and there
    is no projector (`projector=None`). The gradient to the late layer is cut by `Tap(detach=True)`, the default and
    what the paper does; this objective itself leaves it alone.

    Args:
        include_prefix_tokens (`bool`): whether class and register tokens take part.
    """

    detaches_target: ClassVar[bool] = False
