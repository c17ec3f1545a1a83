"""Which column of a dataset holds the images and which the class labels, and what the labels mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Image, Value

from diffusers_srepa.errors import ConfigurationError, DataError


IMAGE_NAMES = ("image", "img", "images", "picture", "jpg", "jpeg", "png", "webp", "pixel_values")
LABEL_NAMES = (
    "label",
    "labels",
    "class",
    "cls",
    "class_label",
    "class_labels",
    "class_id",
    "class_idx",
    "class_name",
    "target",
    "category",
    "fine_label",
    "y",
)


@dataclass(frozen=True)
class Labels:
    """The classes of a map-style dataset.

    Args:
        values (`np.ndarray`): class of every row, int64, in [0, num_classes).
        num_classes (`int`): number of classes.
        id2label (`dict[int, str]`, *optional*): names of the classes, if the dataset has any.
    """

    values: np.ndarray
    num_classes: int
    id2label: dict[int, str] | None


def describe_columns(features: Mapping[str, Any]) -> str:
    """The columns with their types, for error messages: `'img' (Image), 'fine' (ClassLabel), 'text' (string)`."""
    if not features:
        return "no columns"
    return ", ".join(f"{name!r} ({_type_name(feature)})" for name, feature in features.items())


def find_image_column(features: Mapping[str, Any], named: str | None = None) -> str:
    """The column called `named`, else the only one that holds images, else the one with a usual name."""
    if named is not None:
        return _named(features, named, "image_column", _may_hold_images, "not images")
    found = [name for name, feature in features.items() if _holds_images(feature)]
    if not found:
        # Files written without the datasets library keep encoded images as plain bytes.
        found = [name for name in IMAGE_NAMES if name in features and _is_binary(features[name])]
    return _choose(found, IMAGE_NAMES, features, "images", "image_column")


def find_label_column(features: Mapping[str, Any], named: str | None = None) -> str | None:
    """The column called `named`, else the only ClassLabel, else integers or strings with a usual name, else None."""
    if named is not None:
        expected = "but labels are classes, integers or strings"
        return _named(features, named, "label_column", _may_hold_labels, expected)
    found = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    if found:
        return _choose(found, LABEL_NAMES, features, "labels", "label_column")
    usual = [name for name in LABEL_NAMES if name in features and _may_hold_labels(features[name])]
    return usual[0] if usual else None


def class_names(feature: Any) -> dict[int, str] | None:
    """Class names by number of a ClassLabel feature that has names."""
    if isinstance(feature, ClassLabel) and feature.names:
        return dict(enumerate(feature.names))
    return None


def is_string(feature: Any) -> bool:
    """Whether a column holds strings."""
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view")


def read_labels(dataset: Dataset, column: str | None) -> Labels:
    """The labels of every row, read and checked at once; only that column is read.

    Classes keep their numbers and names, integers mean max + 1 classes, strings are numbered in sorted order. Without
    a column, all rows are of one class. A missing label (None or -1), or one outside the classes, is a DataError.
    """
    if column is None:
        return Labels(np.zeros(len(dataset), dtype=np.int64), 1, None)
    feature = dataset.features[column]
    values = dataset.select_columns([column]).with_format("arrow")[:].column(column)
    if is_string(feature):
        return _number_strings(values.cast(pa.large_string()), column)
    numbers = np.asarray(pc.fill_null(values.cast(pa.int64()), -1))
    names = class_names(feature)
    _check_no_missing(numbers == -1, column)
    _check_rows(numbers < 0, numbers, column, "is negative")
    if names is None:
        return Labels(numbers, int(numbers.max()) + 1, None)
    _check_rows(numbers >= len(names), numbers, column, f"is outside the column's {len(names)} classes")
    return Labels(numbers, len(names), names)


def read_label(value: Any, num_classes: int | None, column: str) -> int:
    """The label of one row of a stream; a missing or negative one is the fault of the row, a large one the model's."""
    if value is None or value == -1:
        raise DataError(f"it has no label in the column {column!r} (found {value}).")
    if value < 0:
        raise DataError(f"its label {value} in the column {column!r} is negative.")
    if num_classes is not None and value >= num_classes:
        raise ConfigurationError(
            f"the stream holds the label {value} in the column {column!r}, but the classes are 0 to {num_classes - 1}"
            f": set `num_classes` to at least {value + 1}."
        )
    return int(value)


def _number_strings(values: pa.ChunkedArray, column: str) -> Labels:
    missing = pc.fill_null(pc.equal(values, ""), True)
    _check_no_missing(np.asarray(missing), column)
    names = sorted(pc.unique(values).to_pylist())
    numbers = pc.index_in(values, value_set=pa.array(names, type=pa.large_string()))
    return Labels(np.asarray(numbers).astype(np.int64), len(names), dict(enumerate(names)))


def _check_no_missing(missing: np.ndarray, column: str) -> None:
    rows = np.flatnonzero(missing)
    if len(rows) == 0:
        return
    found, remedy = "no row of the dataset has a label", ""
    if len(rows) < len(missing):
        more = f" (and {len(rows) - 1} more rows)" if len(rows) > 1 else ""
        found, remedy = f"row {rows[0]}{more} of the dataset has no label", "remove such rows, or "
    raise DataError(
        f"{found} in the column {column!r}: {remedy}choose another column (option `label_column`) or split (option "
        "`split`)."
    )


def _check_rows(wrong: np.ndarray, numbers: np.ndarray, column: str, what: str) -> None:
    rows = np.flatnonzero(wrong)
    if len(rows):
        raise DataError(
            f"the label {numbers[rows[0]]} of row {rows[0]} of the dataset {what}: correct the column {column!r}, or "
            "choose another one (option `label_column`)."
        )


def _named(
    features: Mapping[str, Any], named: str, argument: str, is_usable: Callable[[Any], bool], expected: str
) -> str:
    if named in features and is_usable(features[named]):
        return named
    columns = f"columns are {describe_columns(features)} (option `{argument}`)."
    if named not in features:
        raise ConfigurationError(f"the dataset has no column {named!r}, its {columns}")
    raise ConfigurationError(f"the column {named!r} holds {_type_name(features[named])}, {expected}; the {columns}")


def _choose(found: list[str], usual: tuple[str, ...], features: Mapping[str, Any], what: str, argument: str) -> str:
    if len(found) == 1:
        return found[0]
    for name in usual:
        if name in found:
            return name
    problem = "has several columns that could hold" if found else "has no column with"
    raise ConfigurationError(
        f"the dataset {problem} {what}, its columns are {describe_columns(features)}: name one (option `{argument}`)."
    )


def _type_name(feature: Any) -> str:
    return str(feature.dtype) if isinstance(feature, Value) else type(feature).__name__


def _is_binary(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("binary", "large_binary")


def _holds_images(feature: Any) -> bool:
    # A struct of bytes and path is how an Image is stored, and what is left of it without the dataset's metadata.
    return isinstance(feature, Image) or (isinstance(feature, Mapping) and set(feature) == {"bytes", "path"})


def _may_hold_images(feature: Any) -> bool:
    struct = isinstance(feature, Mapping) and "bytes" in feature
    return _holds_images(feature) or struct or _is_binary(feature) or is_string(feature)


def _may_hold_labels(feature: Any) -> bool:
    integer = isinstance(feature, Value) and feature.dtype.startswith(("int", "uint", "bool"))
    return isinstance(feature, ClassLabel) or integer or is_string(feature)
