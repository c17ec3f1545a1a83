"""iREPA's spatial normalisation."""

import pytest
import torch

from diffusers_srepa.alignment.spatial_norm import SpatialNorm
from diffusers_srepa.tokens import TokenMap


def golden_teacher() -> torch.Tensor:
    b = torch.arange(2, dtype=torch.float64).view(2, 1, 1)
    t = torch.arange(16, dtype=torch.float64).view(1, 16, 1)
    d = torch.arange(8, dtype=torch.float64).view(1, 1, 8)
    return torch.sin(0.1 * (t + 1) * (d + 1) + b)


@pytest.mark.parametrize(
    ("alpha", "total", "absolute", "first"),
    [
        (0.6, 70.403863, 254.322883, (-1.004870, -0.516405, 0.271183)),
        (1.0, 0.0, 220.676422, (-1.894394, -1.254509, 0.186157)),
    ],
)
def test_golden_values(alpha, total, absolute, first):
    normalized = SpatialNorm(alpha)(TokenMap(golden_teacher(), (4, 4))).tokens
    assert normalized.dtype == torch.float64
    assert normalized.sum().item() == pytest.approx(total, abs=1e-5)
    assert normalized.abs().sum().item() == pytest.approx(absolute, abs=1e-5)
    assert normalized.flatten()[:3].tolist() == pytest.approx(first, abs=1e-5)


def test_default_alpha_is_the_released_one():
    token_map = TokenMap(golden_teacher(), (4, 4))
    assert torch.equal(SpatialNorm()(token_map).tokens, SpatialNorm(0.6)(token_map).tokens)


def test_prefix_tokens_are_neither_counted_nor_changed():
    patches = golden_teacher()
    prefix = torch.full((2, 1, 8), 1e3, dtype=torch.float64)
    out = SpatialNorm()(TokenMap(torch.cat([prefix, patches], dim=1), (4, 4), num_prefix_tokens=1))
    assert torch.equal(out.prefix_tokens, prefix)
    assert torch.equal(out.patch_tokens, SpatialNorm()(TokenMap(patches, (4, 4))).tokens)


def test_low_precision_input_is_normalized_in_float32():
    patches = golden_teacher().to(torch.bfloat16)
    out = SpatialNorm()(TokenMap(patches, (2, 8)))
    assert out.tokens.dtype == torch.float32
    assert out.grid == (2, 8)
    expected = SpatialNorm()(TokenMap(patches.double(), (2, 8))).tokens
    torch.testing.assert_close(out.tokens.double(), expected, atol=1e-5, rtol=1e-5)


def test_refusals():
    with pytest.raises(ValueError, match="at least 2 patch tokens"):
        SpatialNorm()(TokenMap(torch.randn(1, 2, 4), (1, 1), num_prefix_tokens=1))
    with pytest.raises(ValueError, match="finite"):
        SpatialNorm(float("nan"))
