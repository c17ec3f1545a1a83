"""Figures of a run as PNG files.

Curves and maps are drawn with matplotlib, which comes with the `quickstart` extra; sample grids need Pillow alone.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F

from diffusers_srepa.tokens import TokenMap


Anchor = tuple[int, int]

_INK = "#222222"
_COLOUR = "#1f6fb4"
_ANCHOR_COLOUR = "#e8590c"
# The values of metrics.jsonl that are losses, in the order of their panels; what starts with "alignment/" follows.
_FLOW_TITLES = {
    "loss": ("total loss", "weighted sum of the other losses"),
    "flow": ("flow matching loss", "mean squared error of the velocity"),
    "class_token": ("class token loss", "mean squared error of the class token's velocity"),
}
_ALIGNMENT_TITLES = {
    "cosine": ("alignment: cosine", "-1 = student and teacher tokens agree"),
    "gram_mse": ("alignment: structure (Gram MSE)", "0 = the same token-to-token similarities"),
    "gram_kl": ("alignment: structure (Gram KL)", "0 = the same token-to-token similarities"),
}
_CELL = 64  # smallest side of an image in a grid, in pixels


# --- loss curves ---


def plot_loss_curves(metrics_file: str | Path, out_png: str | Path, smoothing: float | None = None) -> Path:
    """Draw every loss of a run against the training step, one panel each, raw (faint) and smoothed.

    Args:
        metrics_file (`str` or `Path`): `metrics.jsonl` of a run: one JSON object with `step` per line.
        out_png (`str` or `Path`): the picture to write; its folder is created.
        smoothing (`float`, *optional*): width of the smoothing in logged values, see `smooth`; 0 draws the values as
            they are. By default a hundredth of the run, at least 1.

    Raises:
        ValueError: the file holds no loss, or `smoothing` is negative.
        ImportError: matplotlib is not installed.
    """
    if smoothing is not None and smoothing < 0:
        raise ValueError(f"smoothing is {smoothing}, but must not be negative.")
    records = _read_records(Path(metrics_file))
    names = _loss_names(records)
    if not names:
        raise ValueError(f"{metrics_file} holds no losses: give the metrics.jsonl of a run that has logged a step.")
    columns = min(len(names), 2)
    rows = math.ceil(len(names) / columns)
    figure = _new_figure((5.2 * columns, 3.3 * rows))
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, name in zip(axes, names, strict=False):
        points = [(record["step"], record[name]) for record in records if _is_number(record.get(name))]
        _draw_curve(axis, name, points, smoothing)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    figure.savefig(_new_file(out_png), facecolor="white")
    return Path(out_png)


def _read_records(file: Path) -> list[dict[str, Any]]:
    """The records in the order of their steps; a half-written line, as a killed run leaves it, is left out."""
    records = []
    for line in file.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and _is_number(record.get("step")):
            records.append(record)
    return sorted(records, key=lambda record: record["step"])


def _loss_names(records: Sequence[Mapping[str, Any]]) -> list[str]:
    found = {name for record in records for name, value in record.items() if _is_number(value)}
    alignment = sorted(name for name in found if name.startswith("alignment/"))
    return [name for name in _FLOW_TITLES if name in found] + alignment


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _draw_curve(axis: Any, name: str, points: Sequence[tuple[float, float]], smoothing: float | None) -> None:
    steps, values = np.asarray(points, dtype=float).T
    width = max(1.0, len(values) / 100) if smoothing is None else smoothing
    term = name.removeprefix("alignment/")
    title, meaning = _FLOW_TITLES.get(name) or _ALIGNMENT_TITLES.get(term, (f"alignment: {term}", ""))
    axis.plot(steps, values, color=_COLOUR, alpha=0.3, linewidth=1, label="logged")
    axis.plot(steps, smooth(values, width), color=_COLOUR, linewidth=2, label="smoothed")
    if len(steps) == 1:
        axis.plot(steps, values, "o", color=_COLOUR)
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold", color=_INK)
    axis.set_ylabel(name, fontsize=9)
    axis.set_xlabel(f"training step\n({meaning})" if meaning else "training step", fontsize=9)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)


def smooth(values: np.ndarray, width: float) -> np.ndarray:
    """Weighted mean of `values` `(T,)` over their neighbours, with a Gaussian of standard deviation `width` values.

    It looks to both sides, so that the curve does not lag behind; at the ends the weights that are left are rescaled.
    """
    if width == 0:
        return np.asarray(values, dtype=float)
    reach = max(1, math.ceil(3 * width))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    # "full" and a cut, because "same" is as long as the longer of the two.
    sums, weights = (np.convolve(signal, kernel)[reach:-reach] for signal in (values, np.ones(len(values))))
    return sums / weights


# --- image grids ---


def save_image_grid(
    images: Sequence[Image.Image] | torch.Tensor,
    out_png: str | Path,
    rows: int | None = None,
    columns: int | None = None,
    row_labels: Sequence[str] | None = None,
) -> Path:
    """Write images of one size as a grid, filled row by row, with an optional name before each row.

    Images smaller than 64 pixels are enlarged by a whole factor, pixels kept as they are.

    Args:
        images (`Sequence[PIL.Image.Image]` or `torch.Tensor`): pictures, or `(N, 3, H, W)` float in [0, 1].
        out_png (`str` or `Path`): the picture to write; its folder is created.
        rows, columns (`int`, *optional*): one follows from the other; by default as many rows as labels, else a
            square.
        row_labels (`Sequence[str]`, *optional*): one name per row.

    Raises:
        ValueError: no images, images of several sizes, or rows, columns and labels that do not fit together.
    """
    pictures = _as_pictures(images)
    rows, columns = _grid_shape(len(pictures), rows, columns, row_labels)
    width, height = pictures[0].size
    if any(picture.size != (width, height) for picture in pictures):
        raise ValueError("the images of a grid must all have the same size: resize them first.")
    factor = max(1, math.ceil(_CELL / min(width, height)))
    width, height, gap = width * factor, height * factor, 4
    font = ImageFont.load_default(max(14, height // 4))
    margin = math.ceil(max((font.getlength(label) for label in row_labels or []), default=-3 * gap)) + 4 * gap
    size = (margin + columns * (width + gap), gap + rows * (height + gap))
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    for row, label in enumerate(row_labels or []):
        middle = gap + row * (height + gap) + height // 2
        draw.text((margin - 2 * gap, middle), label, fill=_INK, font=font, anchor="rm")
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        place = (margin + column * (width + gap), gap + row * (height + gap))
        grid.paste(picture.resize((width, height), Image.Resampling.NEAREST), place)
    grid.save(_new_file(out_png), format="PNG")
    return Path(out_png)


def _as_pictures(images: Sequence[Image.Image] | torch.Tensor) -> list[Image.Image]:
    if isinstance(images, torch.Tensor):
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must have shape (N, 3, H, W), but have shape {tuple(images.shape)}.")
    if not len(images):
        raise ValueError("there are no images to show: give at least one.")
    return [_to_picture(image) for image in images]


def _to_picture(image: Image.Image | torch.Tensor) -> Image.Image:
    """A picture, or a float image `(3, H, W)` in [0, 1], as a picture."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    array = image.detach().cpu().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(array.permute(1, 2, 0).contiguous().numpy())


def _grid_shape(
    number: int, rows: int | None, columns: int | None, row_labels: Sequence[str] | None
) -> tuple[int, int]:
    if rows is None and columns is None:
        rows = len(row_labels) if row_labels else math.ceil(number / math.ceil(math.sqrt(number)))
    if columns is None:
        columns = math.ceil(number / rows) if rows else 0
    if rows is None:
        rows = math.ceil(number / columns) if columns else 0
    if rows < 1 or columns < 1 or rows * columns < number:
        raise ValueError(f"{number} images do not fit into {rows} rows of {columns}: change rows or columns.")
    if row_labels is not None and len(row_labels) != rows:
        raise ValueError(f"there are {len(row_labels)} row labels for {rows} rows: give one label per row.")
    return rows, columns


# --- similarity maps ---


def similarity_maps(token_map: TokenMap, anchors: Sequence[Anchor]) -> torch.Tensor:
    """Cosine similarity of every patch token with those at the anchors: what the structural terms of sREPA compare.

    Args:
        token_map (`TokenMap`): tokens of any width; prefix tokens play no role.
        anchors (`Sequence[tuple[int, int]]`): the A anchors, row and column on the token grid, counted from 0.

    Returns:
        `torch.Tensor`: shape `(B, A, h, w)`, values in [-1, 1], 1 at the anchor; float32, or float64 for float64
        tokens. A token of zeros has similarity 0 to every token.

    Raises:
        ValueError: no anchor, or one outside the grid.
    """
    if not anchors:
        raise ValueError("there is no anchor to compare the tokens with: give at least one (row, column).")
    _check_anchors(anchors, token_map.grid)
    tokens = F.normalize(token_map.float().patch_tokens, dim=-1)  # (B, N, D)
    numbers = [row * token_map.grid[1] + column for row, column in anchors]
    maps = [torch.einsum("bnd,bd->bn", tokens, tokens[:, number]) for number in numbers]
    return torch.stack(maps, dim=1).clamp(-1, 1).unflatten(2, token_map.grid)


def plot_similarity_maps(
    image: Image.Image | torch.Tensor,
    maps: Mapping[str, torch.Tensor],
    anchors: Sequence[Anchor],
    out_png: str | Path,
    title: str | None = None,
) -> Path:
    """Draw, for each anchor, the image with the anchor marked and one similarity map per name, in common colours.

    Args:
        image (`PIL.Image.Image` or `torch.Tensor`): the picture, or `(3, H, W)` float in [0, 1].
        maps (`Mapping[str, torch.Tensor]`): per name, for instance student and teacher, `(A, h, w)` in [-1, 1]: one
            map per anchor, as `similarity_maps` gives them for one image.
        anchors (`Sequence[tuple[int, int]]`): the A anchors, row and column on the token grid.
        out_png (`str` or `Path`): the picture to write; its folder is created.
        title (`str`, *optional*): a line above the figure.

    Raises:
        ValueError: no maps, or maps whose number or grid do not fit the anchors and each other.
        ImportError: matplotlib is not installed.
    """
    arrays = {name: value.detach().cpu().float().numpy() for name, value in maps.items()}
    grid = _check_maps(arrays, anchors)
    lowest = min(float(value.min()) for value in arrays.values())
    limits = (math.floor(min(lowest, 0.9) * 10) / 10, 1.0)
    figure = _new_figure((2.5 * (1 + len(arrays)) + 1.0, 2.45 * len(anchors) + 0.5))
    axes = figure.subplots(len(anchors), 1 + len(arrays), squeeze=False)
    drawn = None
    for row, anchor in enumerate(anchors):
        _draw_image(axes[row, 0], _to_picture(image), grid, anchor)
        for axis, values in zip(axes[row, 1:], arrays.values(), strict=True):
            drawn = _draw_map(axis, values[row], anchor, limits)
    for axis, name in zip(axes[0], ["image and anchor", *arrays], strict=True):
        axis.set_title(name, fontsize=11, fontweight="bold", color=_INK)
    bar = figure.colorbar(drawn, ax=list(axes.flatten()), shrink=0.9, pad=0.02)
    bar.set_label("cosine similarity with the anchor patch", fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11, color=_INK)
    figure.savefig(_new_file(out_png), facecolor="white")
    return Path(out_png)


def _check_maps(maps: Mapping[str, np.ndarray], anchors: Sequence[Anchor]) -> tuple[int, int]:
    if not maps or not len(anchors):
        raise ValueError("there is nothing to draw: give at least one map and one anchor.")
    shapes = {name: value.shape for name, value in maps.items()}
    grids = {shape[1:] for shape in shapes.values()}
    if any(len(shape) != 3 or shape[0] != len(anchors) for shape in shapes.values()) or len(grids) != 1:
        raise ValueError(
            f"the maps have shapes {shapes}, but each must be ({len(anchors)}, h, w): one map per anchor, on one grid."
        )
    height, width = next(iter(grids))
    _check_anchors(anchors, (height, width))
    return height, width


def _check_anchors(anchors: Sequence[Anchor], grid: tuple[int, int]) -> None:
    height, width = grid
    if any(not (0 <= row < height and 0 <= column < width) for row, column in anchors):
        raise ValueError(f"the anchors {list(anchors)} do not all lie on the grid of {height} x {width}.")


def _draw_image(axis: Any, picture: Image.Image, grid: tuple[int, int], anchor: Anchor) -> None:
    """The picture in token coordinates, with the borders of its patches."""
    height, width = grid
    axis.imshow(np.asarray(picture), extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="nearest")
    # Without major ticks: a minor tick at the place of a major one is left out.
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xticks(np.arange(width + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(height + 1) - 0.5, minor=True)
    if max(grid) <= 32:
        axis.grid(which="minor", color="white", alpha=0.5, linewidth=0.6)
    _mark(axis, anchor)


def _draw_map(axis: Any, values: np.ndarray, anchor: Anchor, limits: tuple[float, float]) -> Any:
    drawn = axis.imshow(values, vmin=limits[0], vmax=limits[1], cmap="viridis", interpolation="nearest")
    if max(values.shape) <= 8:
        middle = (limits[0] + limits[1]) / 2
        for (row, column), value in np.ndenumerate(values):
            colour = "white" if value < middle else "black"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    _mark(axis, anchor)
    return drawn


def _mark(axis: Any, anchor: Anchor) -> None:
    from matplotlib.patches import Rectangle

    row, column = anchor
    corner = (column - 0.5, row - 0.5)
    axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=_ANCHOR_COLOUR, linewidth=2.5, clip_on=False))
    axis.tick_params(which="both", length=0, labelbottom=False, labelleft=False)


# --- files ---


def _new_figure(size: tuple[float, float]) -> Any:
    """A figure of its own, independent of pyplot's state and of any display."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            "figures need matplotlib, which is not installed: pip install 'diffusers-srepa[quickstart]'."
        )
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _new_file(out_png: str | Path) -> Path:
    """The path of a picture, in a folder that exists."""
    path = Path(out_png)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
