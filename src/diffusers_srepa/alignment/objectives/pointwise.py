"""Objectives that compare each token with its counterpart: REPA's cosine and LayerSync."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from diffusers_srepa.alignment.gram.normalize import normalize_tokens
from diffusers_srepa.alignment.objectives.base import AlignmentObjective


@dataclass(frozen=True)
class CosineAlignment(AlignmentObjective):
    """Mean over all tokens of `-cos(student_i, target_i)`, per sample; in [-1, 1].

    REPA (Yu et al., arXiv 2410.06940) and Eq. 4 of sREPA, which writes `1 - cos`: same gradient. Prefix tokens take
    part, as in REG. A token with norm below 1e-6 counts as zero: it contributes 0 and gets zero gradient.
    """

    needs_equal_width: ClassVar[bool] = True

    def compute(self, student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return -(normalize_tokens(student) * normalize_tokens(target)).sum(dim=-1).mean(dim=-1)


@dataclass(frozen=True)
class LayerSyncAlignment(CosineAlignment):
    """Mean over all tokens of `-cos(early_i, late_i)`, per sample; in [-1, 1]: an early layer follows a later one.

    Haghighi et al., arXiv 2510.12581: the term's tap is the early layer, its target a `Tap` on the late one, and there
    is no projector (`projector=None`). The gradient to the late layer is cut by `Tap(detach=True)`, the default and
    what the paper does; this objective itself leaves it alone.
    """

    detaches_target: ClassVar[bool] = False
