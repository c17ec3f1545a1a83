"""The quickstart's dataset: 1,797 real handwritten digits as a folder of parquet files.

The digits come with scikit-learn (`sklearn.datasets.load_digits`: scans of 8 x 8 pixels with values 0 to 16, part of
"Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak, UCI Machine Learning Repository), so nothing
is downloaded. Here they become images of 32 x 32 pixels, white on black, with the class names zero to nine.

    python examples/quickstart/digits.py examples/quickstart/data

wrote the copy that is shipped: `data/train-00000-of-00001.parquet` (1,497 digits) and
`data/test-00000-of-00001.parquet` (300 held-out digits) below that folder, which `datasets.load_dataset(folder)` reads
as the splits `train` and `test`.
"""

from __future__ import annotations

import argparse
import functools
import io
import os
from pathlib import Path

import numpy as np
from PIL import Image


CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
IMAGE_SIZE = 32
NUM_HELD_OUT = 300
SPLITS = ("train", "test")

_MARGIN = 1  # pixels of the 8 x 8 scan: the strokes reach its upper and lower edge
_SUPERSAMPLING = 10


def render_digit(scan: np.ndarray) -> np.ndarray:
    """Draw one scan `(8, 8)` with values 0..16 as a smooth grey image, uint8 `(32, 32)`.

    The scan gets a margin, is enlarged by bicubic interpolation far beyond the target, goes through the contrast curve
    3x^2 - 2x^3 (which makes strokes out of blobs and keeps black, white and the middle grey), and is averaged down.
    """
    padded = np.pad(scan / 16, _MARGIN).astype(np.float32)
    large_size = IMAGE_SIZE * _SUPERSAMPLING
    large = np.asarray(Image.fromarray(padded).resize((large_size, large_size), Image.Resampling.BICUBIC))
    large = np.clip(large, 0, 1)
    large = large**2 * (3 - 2 * large)
    small = Image.fromarray(large).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    return np.rint(np.asarray(small) * 255).astype(np.uint8)


@functools.cache
def load_digit_split(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The drawn digits of `"train"` or `"test"` in a fixed order.

    The split is random, stratified by class and the same on every machine.

    Returns:
        uint8 images `(N, 32, 32)` and int64 labels `(N,)`; the label is the digit.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans, labels = load_digits(return_X_y=True)
    train, held_out = train_test_split(
        np.arange(len(labels)), test_size=NUM_HELD_OUT, stratify=labels, random_state=0, shuffle=True
    )
    chosen = np.sort({"train": train, "test": held_out}[split])
    images = np.stack([render_digit(scan) for scan in scans[chosen].reshape(-1, 8, 8)])
    return images, labels[chosen].astype(np.int64)


def split_file(folder: str | Path, split: str) -> Path:
    """The parquet file of one split below `folder`."""
    return Path(folder) / "data" / f"{split}-00000-of-00001.parquet"


def write_digits(folder: str | Path) -> Path:
    """Write the dataset below `folder`, unless it is there already, and return `folder` as a path.

    A file appears under its final name only when it is complete, so an interrupted call is repaired by the next one.
    """
    folder = Path(folder)
    for split in SPLITS:
        path = split_file(folder, split)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_split(path, split)
    return folder


def _write_split(path: Path, split: str) -> None:
    import datasets
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    datasets.disable_progress_bars()
    images, labels = load_digit_split(split)
    features = Features({"image": ImageFeature(mode="RGB"), "label": ClassLabel(names=list(CLASS_NAMES))})
    rows = {"image": [{"bytes": _png(image), "path": None} for image in images], "label": labels.tolist()}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    Dataset.from_dict(rows, features=features).to_parquet(str(partial))
    partial.replace(path)


def _png(image: np.ndarray) -> bytes:
    # Grey in the file, which is a third of the size; the column's mode makes it RGB when it is read.
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def read_digits(folder: str | Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Read one split that `write_digits` wrote: uint8 RGB images `(N, 32, 32, 3)` and int64 labels `(N,)`.

    Raises:
        FileNotFoundError: the split is not there.
    """
    import pyarrow.parquet

    path = split_file(folder, split)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: write it with `python {Path(__file__).name} {folder}`.")
    table = pyarrow.parquet.read_table(path).to_pydict()
    images = [np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in table["image"]]
    return np.stack(images), np.asarray(table["label"], dtype=np.int64)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write scikit-learn's handwritten digits as an image dataset.")
    parser.add_argument("folder", help="where the dataset goes, for instance examples/quickstart/data")
    folder = write_digits(parser.parse_args().folder)
    print(f"The digits are in {folder}: 1,497 for training, {NUM_HELD_OUT} held out.")


if __name__ == "__main__":
    main()
