import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value

from diffusers_srepa.data.columns import find_image_column, find_label_column, read_label, read_labels
from diffusers_srepa.errors import ConfigurationError, DataError


NAMES = ClassLabel(names=["cat", "dog"])


def table(values, feature) -> Dataset:
    return Dataset.from_dict({"label": values}, features=Features({"label": feature}))


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"photo": Image(), "label": NAMES}, "photo"),
        ({"mask": Image(), "image": Image()}, "image"),
        ({"text": Value("string"), "img": {"bytes": Value("binary"), "path": Value("string")}}, "img"),
        ({"jpg": Value("binary"), "cls": Value("int64")}, "jpg"),
    ],
)
def test_the_image_column_is_found(features, expected):
    assert find_image_column(features) == expected


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"image": Image(), "breed": NAMES}, "breed"),
        ({"coarse_label": NAMES, "fine_label": NAMES}, "fine_label"),
        ({"label": Value("int32")}, "label"),
        ({"class": Value("string"), "text": Value("string")}, "class"),
        ({"cls": Value("int64"), "width": Value("int64")}, "cls"),
        ({"label": Value("float32")}, None),
        ({"image": Image(), "width": Value("int64"), "caption": Value("string")}, None),
    ],
)
def test_the_label_column_is_found(features, expected):
    assert find_label_column(features) == expected


def test_a_named_column_wins():
    features = {"a": Image(), "b": Image(), "coarse": NAMES, "fine": NAMES, "path": Value("string")}
    assert find_image_column(features, "b") == "b"
    assert find_image_column(features, "path") == "path"
    assert find_label_column(features, "coarse") == "coarse"


@pytest.mark.parametrize(
    ("find", "named", "message"),
    [
        (find_image_column, "picture", r"no column 'picture', its columns are 'a' \(Image\), .*`image_column`"),
        (find_image_column, "size", r"'size' holds int64, not images.*`image_column`"),
        (find_image_column, None, r"several columns that could hold images.*`image_column`"),
        (find_label_column, "label", r"no column 'label', its columns are 'a' \(Image\), .*`label_column`"),
        (find_label_column, "score", r"'score' holds float64.*`label_column`"),
        (find_label_column, None, r"several columns that could hold labels.*`label_column`"),
    ],
)
def test_a_column_that_does_not_fit_is_one_sentence(find, named, message):
    features = {"a": Image(), "b": Image(), "x": NAMES, "z": NAMES, "size": Value("int64"), "score": Value("float64")}
    with pytest.raises(ConfigurationError, match=message) as error:
        find(features, named)
    assert "\n" not in str(error.value)


def test_no_image_column_at_all():
    with pytest.raises(ConfigurationError, match=r"no column with images, its columns are 'text' \(string\)"):
        find_image_column({"text": Value("string")})


def test_classes_keep_their_numbers_and_names():
    labels = read_labels(table([1, 0, 1], NAMES), "label")
    assert labels.values.tolist() == [1, 0, 1]
    assert (labels.num_classes, labels.id2label) == (2, {0: "cat", 1: "dog"})


@pytest.mark.parametrize("dtype", ["int8", "uint16", "int64"])
def test_integers_mean_as_many_classes_as_the_largest_says(dtype):
    labels = read_labels(table([4, 0, 2], Value(dtype)), "label")
    assert labels.values.dtype == np.int64
    assert (labels.num_classes, labels.id2label) == (5, None)


def test_booleans_are_two_classes():
    labels = read_labels(table([True, False], Value("bool")), "label")
    assert (labels.values.tolist(), labels.num_classes) == ([1, 0], 2)


@pytest.mark.parametrize("dtype", ["string", "large_string"])
def test_strings_are_numbered_in_sorted_order(dtype):
    labels = read_labels(table(["pug", "Akita", "pug", "beagle"], Value(dtype)), "label")
    assert labels.values.tolist() == [2, 0, 2, 1]
    assert labels.id2label == {0: "Akita", 1: "beagle", 2: "pug"}


def test_labels_follow_a_selection_of_rows():
    labels = read_labels(table([5, 6, 7], Value("int64")).select([2, 0]), "label")
    assert labels.values.tolist() == [7, 5]


@pytest.mark.parametrize(
    ("values", "feature", "message"),
    [
        ([0, None, 1, None], Value("int64"), r"row 1 \(and 1 more rows\) of the dataset has no label"),
        ([0, 1, -1], NAMES, r"row 2 of the dataset has no label in the column 'label'"),
        (["a", None], Value("string"), r"row 1 of the dataset has no label"),
        (["", "a"], Value("string"), r"row 0 of the dataset has no label"),
        ([-1, -1], Value("int64"), r"no row of the dataset has a label.*`split`"),
        ([0, -7], Value("int64"), r"label -7 of row 1 of the dataset is negative"),
    ],
)
def test_rows_without_a_usable_label_are_named(values, feature, message):
    with pytest.raises(DataError, match=message):
        read_labels(table(values, feature), "label")


def test_a_class_number_without_a_name_is_refused():
    unchecked = table([0, 2], Value("int64")).cast_column("label", Value("int64"))
    named = unchecked.with_format(None)
    named.info.features["label"] = NAMES
    with pytest.raises(DataError, match="label 2 of row 1 of the dataset is outside the column's 2 classes"):
        read_labels(named, "label")


@pytest.mark.parametrize(("value", "message"), [(None, "no label"), (-1, "no label"), (-3, "-3")])
def test_labels_of_a_stream_are_checked_one_by_one(value, message):
    assert read_label(4, 5, "label") == 4
    assert read_label(400, None, "label") == 400
    with pytest.raises(DataError, match=message):
        read_label(value, 5, "label")


def test_a_label_of_a_stream_beyond_the_model_s_classes_stops_the_run():
    with pytest.raises(ConfigurationError, match="set `num_classes` to at least 6"):
        read_label(5, 5, "label")
