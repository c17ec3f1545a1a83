"""Similarity maps against cosines worked out by hand."""

import pytest
import torch

from diffusers_srepa.tokens import TokenMap
from diffusers_srepa.visualization.figures import similarity_maps


def _tokens() -> TokenMap:
    # One image, a grid of 2 x 3, in row-major order.
    rows = [[1.0, 0.0], [2.0, 0.0], [-3.0, 0.0], [0.0, 5.0], [3.0, 4.0], [0.0, 0.0]]
    return TokenMap(torch.tensor([rows], dtype=torch.float64), (2, 3))


def similarity_map(token_map: TokenMap, anchor: tuple[int, int]) -> torch.Tensor:
    return similarity_maps(token_map, [anchor]).squeeze(1)


def test_values_on_the_grid():
    expected = torch.tensor([[[1.0, 1.0, -1.0], [0.0, 0.6, 0.0]]], dtype=torch.float64)
    torch.testing.assert_close(similarity_map(_tokens(), (0, 1)), expected)


def test_anchor_is_row_then_column():
    expected = torch.tensor([[[0.0, 0.0, 0.0], [1.0, 0.8, 0.0]]], dtype=torch.float64)
    torch.testing.assert_close(similarity_map(_tokens(), (1, 0)), expected)


def test_prefix_tokens_play_no_role():
    plain = _tokens()
    prefixed = TokenMap(torch.cat([torch.full((1, 2, 2), 7.0), plain.tokens], dim=1), plain.grid, num_prefix_tokens=2)
    torch.testing.assert_close(similarity_map(prefixed, (1, 1)), similarity_map(plain, (1, 1)))


def test_several_anchors_and_images():
    tokens = TokenMap(torch.randn(4, 6, 5), (3, 2))
    maps = similarity_maps(tokens, [(0, 0), (2, 1)])
    assert maps.shape == (4, 2, 3, 2)
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps[:, 0, 0, 0], torch.ones(4))
    torch.testing.assert_close(maps[:, 1, 2, 1], torch.ones(4))
    # Similarity is symmetric: what the first anchor thinks of the second, and the other way round.
    torch.testing.assert_close(maps[:, 0, 2, 1], maps[:, 1, 0, 0])


def test_half_precision_is_compared_in_float32():
    assert similarity_map(TokenMap(torch.randn(1, 4, 8, dtype=torch.bfloat16), (2, 2)), (0, 0)).dtype == torch.float32


@pytest.mark.parametrize("anchor", [(2, 0), (0, 3), (-1, 0)])
def test_anchor_outside_the_grid(anchor: tuple[int, int]):
    with pytest.raises(ValueError, match="2 x 3"):
        similarity_map(_tokens(), anchor)


def test_no_anchor():
    with pytest.raises(ValueError, match="at least one"):
        similarity_maps(_tokens(), [])
