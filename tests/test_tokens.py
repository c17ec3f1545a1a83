"""Tokens with their grid: order, prefix tokens, resampling, wrong shapes."""

import pytest
import torch

from diffusers_srepa.tokens import TeacherFeatures, TokenMap, resize_token_map


def test_order_is_row_major() -> None:
    token_map = TokenMap(torch.arange(6.0).reshape(1, 6, 1), (2, 3))
    assert token_map.patch_map()[0, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    back = TokenMap.from_map(token_map.patch_map())
    assert back.grid == (2, 3) and torch.equal(back.tokens, token_map.tokens)


def test_prefix_tokens_come_first() -> None:
    token_map = TokenMap(torch.randn(2, 8, 5), grid=(2, 3), num_prefix_tokens=2)
    assert torch.equal(token_map.prefix_tokens, token_map.tokens[:, :2])
    assert torch.equal(token_map.patch_tokens, token_map.tokens[:, 2:])
    assert token_map.patch_map().shape == (2, 5, 2, 3)
    assert token_map.without_prefix().num_prefix_tokens == 0
    assert token_map.dim == 5


def test_conversions_keep_the_grid() -> None:
    token_map = TokenMap(torch.randn(2, 7, 5, dtype=torch.bfloat16, requires_grad=True), (2, 3), 1)
    assert token_map.float().tokens.dtype == torch.float32 and token_map.float().grid == (2, 3)
    assert not token_map.detach().tokens.requires_grad and token_map.detach().num_prefix_tokens == 1
    double = TokenMap(torch.randn(1, 6, 2, dtype=torch.float64), (2, 3))
    assert double.float().tokens.dtype == torch.float64
    assert TokenMap.from_map(torch.randn(1, 4, 2, 3)).grid == (2, 3)


@pytest.mark.parametrize("shape, grid, prefix", [((1, 6, 2), (2, 2), 0), ((1, 6, 2), (2, 3), 1), ((6, 2), (2, 3), 0)])
def test_tokens_that_do_not_fill_their_grid_are_refused(shape, grid, prefix) -> None:
    with pytest.raises(ValueError, match="tokens"):
        TokenMap(torch.zeros(shape), grid, prefix)


def test_teacher_features_with_and_without_class_token() -> None:
    features = TeacherFeatures(torch.randn(2, 4, 3), (2, 2), class_token=torch.randn(2, 3))
    assert features.token_map().num_prefix_tokens == 0
    with_class = features.token_map(include_class_token=True)
    assert with_class.num_prefix_tokens == 1 and torch.equal(with_class.tokens[:, 0], features.class_token)
    with pytest.raises(ValueError, match="no class token"):
        TeacherFeatures(torch.randn(2, 4, 3), (2, 2)).token_map(include_class_token=True)


def test_area_resize_averages_cells_and_keeps_the_prefix() -> None:
    patches = torch.arange(16.0).reshape(1, 16, 1)
    token_map = TokenMap(torch.cat([torch.full((1, 1, 1), -7.0), patches], dim=1), (4, 4), 1)
    small = resize_token_map(token_map, (2, 2))
    assert small.tokens.flatten().tolist() == [-7.0, 2.5, 4.5, 10.5, 12.5]
    assert resize_token_map(token_map, (4, 4)) is token_map


def test_bilinear_resize_keeps_a_constant_and_unknown_modes_are_refused() -> None:
    token_map = TokenMap(torch.full((1, 12, 3), 2.0), (3, 4))
    resized = resize_token_map(token_map, (6, 2), "bilinear")
    assert resized.grid == (6, 2)
    torch.testing.assert_close(resized.tokens, torch.full((1, 12, 3), 2.0))
    with pytest.raises(ValueError, match="nearest"):
        resize_token_map(token_map, (2, 2), "nearest")
