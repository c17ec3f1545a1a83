"""Class labels: numbers, names, synonyms, and what is neither."""

from typing import Any

import numpy as np
import pytest
import torch

from diffusers_srepa.pipelines.hub import SiTPipeline
from tests.helpers.tiny_pipeline import ID2LABEL, generators, tiny_pipeline


@pytest.fixture(scope="module")
def pipe() -> SiTPipeline:
    return tiny_pipeline()


def labels_of(pipe: SiTPipeline, class_labels: Any) -> list[int]:
    """The labels with which the transformer is called."""
    seen: list[list[int]] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    try:
        pipe(class_labels, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent")
    finally:
        hook.remove()
    return seen[0]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (3, [3]),
        (0, [0]),
        (9, [9]),
        ([1, 3], [1, 3]),
        ((1, 3), [1, 3]),
        ([[1], [3]], [1, 3]),
        (np.int64(3), [3]),
        (np.array([1, 3]), [1, 3]),
        (torch.tensor(3), [3]),
        (torch.tensor([1, 3], dtype=torch.int32), [1, 3]),
        ("golden retriever", [1]),
        (["golden retriever", 3, "tench"], [1, 3, 0]),
        ("Tinca tinca", [0]),
        ("TINCA  TINCA", [0]),
        (" man-eater ", [5]),
        ("great white shark, white shark, man-eater", [5]),
        ("labrador Retriever", [3]),
    ],
)
def test_forms(pipe: SiTPipeline, given: Any, expected: list[int]) -> None:
    assert labels_of(pipe, given) == expected


def test_null_class_is_first_in_a_guided_batch(pipe: SiTPipeline) -> None:
    """diffusers' caches expect the unconditional half first."""
    seen: list[list[int]] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    pipe([1, 2], num_inference_steps=2, guidance_scale=2.0, generator=generators(0, 1), output_type="latent")
    hook.remove()
    assert seen == [[10, 10, 1, 2]] * 2


def test_get_label_ids(pipe: SiTPipeline) -> None:
    assert pipe.get_label_ids("tench") == [0]
    assert pipe.get_label_ids(["white shark", "tench"]) == [5, 0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("goldan retriever", "no class named 'goldan retriever': did you mean 'golden retriever'"),
        ("xyzzy", "no class named 'xyzzy': see `pipe.config.id2label`"),
        ("crane", "'crane' belongs to the classes 2 and 4"),
        (10, "has 10, but the transformer knows classes 0 to 9"),
        ([0, -1], "has -1, but the transformer knows classes 0 to 9"),
        ([], "is empty"),
        ("", "no class named ''"),
        (1.0, "has 1.0 of type float"),
        (torch.tensor([1.0]), "has 1.0 of type float"),
        (True, "has True of type bool"),
        (None, "has None of type NoneType"),
        ([1, None], "has None of type NoneType"),
    ],
)
def test_wrong_labels(pipe: SiTPipeline, given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")) as error:
        pipe(given)
    assert "\n" not in str(error.value)


def test_names_need_id2label() -> None:
    pipe = tiny_pipeline(id2label=None)
    assert pipe.config.id2label is None
    with pytest.raises(ValueError, match="'tench' cannot be looked up because the pipeline has no `id2label`"):
        pipe("tench")
    assert labels_of(pipe, [1, 2]) == [1, 2]


def test_id2label_is_saved_and_replaceable(tmp_path: Any) -> None:
    pipe = tiny_pipeline(id2label={0: "tench", "1": "crane"})
    assert pipe.config.id2label == {"0": "tench", "1": "crane"}
    pipe.save_pretrained(tmp_path)
    assert SiTPipeline.from_pretrained(tmp_path).config.id2label == {"0": "tench", "1": "crane"}
    renamed = SiTPipeline.from_pretrained(tmp_path, id2label={"7": "heron"})
    assert renamed.get_label_ids("Heron") == [7]


@pytest.mark.parametrize("wrong", [{"tench": 0}, {"0": 1}, {-1: "x"}, {"0": None}])
def test_wrong_id2label(wrong: dict) -> None:
    with pytest.raises(ValueError, match="must map class numbers to names"):
        tiny_pipeline(id2label=wrong)


def test_names_of_a_label_are_those_of_its_entry(pipe: SiTPipeline) -> None:
    for number, entry in ID2LABEL.items():
        if entry != "crane":
            assert pipe.get_label_ids(entry.split(",")) == [int(number)] * len(entry.split(","))
