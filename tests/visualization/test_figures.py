"""Figures are there, of the expected layout, and not blank; wrong input is one sentence."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_srepa.visualization import figures
from diffusers_srepa.visualization.figures import plot_loss_curves, plot_similarity_maps, save_image_grid, smooth


NAMES = ("loss", "flow", "alignment/cosine", "alignment/gram_mse")


def _write_metrics(file: Path, names: tuple[str, ...] = NAMES, num_steps: int = 20) -> Path:
    records = [
        {"step": step, **{name: 2.0 / step + index for index, name in enumerate(names)}, "lr": 1e-3}
        for step in range(1, num_steps + 1)
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def _array(file: Path) -> np.ndarray:
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def _share_of(picture: np.ndarray, colour: str) -> float:
    """Share of the pixels that are close to a colour."""
    wanted = np.array([int(colour[start : start + 2], 16) for start in (1, 3, 5)])
    return float((np.abs(picture - wanted).max(axis=-1) < 12).mean())


class TestLossCurves:
    def test_a_panel_per_loss(self, tmp_path: Path):
        picture = _array(plot_loss_curves(_write_metrics(tmp_path / "metrics.jsonl"), tmp_path / "new" / "curves.png"))
        height, width, _ = picture.shape
        quarters = [
            picture[y : y + height // 2, x : x + width // 2] for y in (0, height // 2) for x in (0, width // 2)
        ]
        assert [_share_of(quarter, "#1f6fb4") > 0.001 for quarter in quarters] == [True] * 4

    def test_fewer_losses_make_a_smaller_figure(self, tmp_path: Path):
        sizes = []
        for names in (NAMES, NAMES[:2], NAMES[:1]):
            metrics = _write_metrics(tmp_path / "metrics.jsonl", names)
            sizes.append(_array(plot_loss_curves(metrics, tmp_path / "curves.png")).shape[:2])
        assert sizes[0][0] == 2 * sizes[1][0] == 2 * sizes[2][0]
        assert sizes[0][1] == sizes[1][1] == 2 * sizes[2][1]

    def test_killed_and_diverged_runs_are_drawn(self, tmp_path: Path):
        metrics = _write_metrics(tmp_path / "metrics.jsonl")
        with metrics.open("a") as file:
            file.write('{"step": 21, "loss": "nan", "flow": NaN}\n{"step": 22, "lo')
        assert _share_of(_array(plot_loss_curves(metrics, tmp_path / "curves.png")), "#1f6fb4") > 0.001

    @pytest.mark.parametrize("text", ["", '{"step": 1, "lr": 0.1}\n', "no json\n"])
    def test_no_losses(self, tmp_path: Path, text: str):
        (tmp_path / "metrics.jsonl").write_text(text)
        with pytest.raises(ValueError, match="holds no losses"):
            plot_loss_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")

    def test_smoothing(self, tmp_path: Path):
        np.testing.assert_allclose(smooth(np.full(4, 4.0), 2.0), np.full(4, 4.0))
        # A straight line stays one away from the ends, so there is no lag.
        np.testing.assert_allclose(smooth(np.arange(9.0), 1.0)[3:-3], np.arange(9.0)[3:-3])
        # A width at which a neighbour has half the weight: (2 * 3 + 0) / 3 and (3 + 2 * 0) / 3.
        half = (2 * np.log(2)) ** -0.5
        np.testing.assert_allclose(smooth(np.array([3.0, 0.0]), half), [2.0, 1.0])
        np.testing.assert_allclose(smooth(np.array([3.0, 0.0]), 0), [3.0, 0.0])
        with pytest.raises(ValueError, match="smoothing"):
            plot_loss_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", smoothing=-1)


class TestImageGrid:
    def test_rows_are_filled_in_order(self, tmp_path: Path):
        colours = torch.tensor([20, 60, 100, 140, 180, 220]) / 255
        images = colours.view(6, 1, 1, 1).expand(6, 3, 8, 8)
        picture = _array(save_image_grid(images, tmp_path / "grid.png", rows=2))
        height, width, _ = picture.shape
        assert (height, width) == (2 * 64 + 3 * 4, 3 * 64 + 4 * 4)
        found = [picture[4 + row * 68 + 32, 4 + column * 68 + 32, 0] for row in range(2) for column in range(3)]
        assert found == [20, 60, 100, 140, 180, 220]

    def test_labels_stand_before_their_rows(self, tmp_path: Path):
        images = [Image.new("RGB", (64, 64), "white")] * 4
        plain = _array(save_image_grid(images, tmp_path / "plain.png", rows=2))
        labelled = _array(save_image_grid(images, tmp_path / "labelled.png", row_labels=["seven", "nine"]))
        margin = labelled.shape[1] - plain.shape[1]
        assert margin > 30
        for half in np.array_split(labelled[:, :margin], 2):
            assert (half < 128).any()

    def test_large_images_keep_their_size(self, tmp_path: Path):
        assert _array(save_image_grid([Image.new("RGB", (100, 80))], tmp_path / "one.png")).shape[:2] == (88, 108)

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"rows": 1, "columns": 2}, "do not fit"),
            ({"rows": 0}, "do not fit"),
            ({"row_labels": ["a", "b"], "rows": 3}, "2 row labels for 3 rows"),
        ],
    )
    def test_shapes_that_do_not_fit(self, tmp_path: Path, options: dict, sentence: str):
        with pytest.raises(ValueError, match=sentence):
            save_image_grid(torch.zeros(3, 3, 8, 8), tmp_path / "grid.png", **options)

    def test_wrong_images(self, tmp_path: Path):
        with pytest.raises(ValueError, match="no images"):
            save_image_grid([], tmp_path / "grid.png")
        with pytest.raises(ValueError, match=r"\(N, 3, H, W\)"):
            save_image_grid(torch.zeros(2, 1, 8, 8), tmp_path / "grid.png")
        with pytest.raises(ValueError, match="same size"):
            save_image_grid([Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))], tmp_path / "grid.png")


class TestSimilarityMaps:
    def test_layout(self, tmp_path: Path):
        maps = {"teacher": torch.rand(2, 4, 4), "student": torch.rand(2, 4, 4)}
        anchors = [(0, 0), (3, 2)]
        two = _array(plot_similarity_maps(torch.rand(3, 32, 32), maps, anchors, tmp_path / "maps.png"))
        one = plot_similarity_maps(
            torch.rand(3, 32, 32), {"teacher": maps["teacher"][:1]}, anchors[:1], tmp_path / "one.png", title="a title"
        )
        assert two.shape[0] > _array(one).shape[0]
        assert two.shape[1] > _array(one).shape[1]
        # The anchor is outlined in the image and in every map.
        assert _share_of(two, "#e8590c") > 0.005

    def test_colours_are_shared(self, tmp_path: Path):
        # Both maps are constant but for the anchor; a scale per map would paint both constants alike.
        low, high = torch.full((1, 16, 16), 0.1), torch.full((1, 16, 16), 0.9)
        low[0, 0, 0] = high[0, 0, 0] = 1.0
        image = torch.zeros(3, 32, 32)
        picture = _array(plot_similarity_maps(image, {"a": low, "b": high}, [(0, 0)], tmp_path / "maps.png"))
        middle = picture[picture.shape[0] // 2]
        dark_purple = (np.abs(middle - [68, 1, 84]).max(axis=-1) < 25).sum()
        green_yellow = (np.abs(middle - [189, 223, 38]).max(axis=-1) < 25).sum()
        assert dark_purple > 100
        assert green_yellow > 100

    @pytest.mark.parametrize(
        ("maps", "anchors", "sentence"),
        [
            ({}, [(0, 0)], "nothing to draw"),
            ({"a": torch.zeros(1, 4, 4)}, [], "nothing to draw"),
            ({"a": torch.zeros(1, 4, 4)}, [(0, 0), (1, 1)], "one map per anchor"),
            ({"a": torch.zeros(1, 4, 4), "b": torch.zeros(1, 2, 2)}, [(0, 0)], "on one grid"),
            ({"a": torch.zeros(1, 4, 4)}, [(4, 0)], "do not all lie"),
        ],
    )
    def test_maps_that_do_not_fit(self, tmp_path: Path, maps: dict, anchors: list, sentence: str):
        with pytest.raises(ValueError, match=sentence):
            plot_similarity_maps(torch.zeros(3, 32, 32), maps, anchors, tmp_path / "maps.png")


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(figures.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"diffusers-srepa\[quickstart\]"):
        plot_loss_curves(_write_metrics(tmp_path / "metrics.jsonl"), tmp_path / "curves.png")
