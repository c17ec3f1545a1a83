"""Whatever a configuration file or a command line holds, it gives a valid configuration or one sentence."""

import copy
import math
import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffusers_srepa.configuration.command_line import load_training_config, parse_training_config
from diffusers_srepa.configuration.training import TrainingConfig
from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.training.methods.checks import check_names


# The same cases at every run; FUZZ_ROUNDS and FUZZ_SEED look at more of them.
ROUNDS = int(os.environ.get("FUZZ_ROUNDS", "30"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
REQUIRED = ["--output_dir", "out", "--data.dataset", "images"]
SECONDS_AT_MOST = 20

RICH = {
    "output_dir": "out",
    "seed": 3,
    "data": {"dataset": "images", "streaming": True, "num_workers": 1},
    "model": {"preset": "SiT-B/2", "num_layers": 3, "mlp_ratio": 2.0},
    "teachers": {"clip": {"name_or_path": "clip", "grid": [4, 4], "resample": "area"}},
    "alignment": {
        "preset": "irepa+srepa",
        "taps": {"late": 3},
        "projectors": {"wide": {"name": "mlp", "hidden_dim": 8}},
        "target_transform": {"name": "spatial_norm", "alpha": 0.6},
        "terms": {
            "cosine": {"objective": {"name": "cosine"}, "weight": {"name": "hard_stop", "step": 2}},
            "kl": {
                "objective": {"name": "gram_kl", "tau_teacher": 0.2},
                "weight": 0.5,
                "target": "clip",
                "tap": "late",
            },
        },
    },
    "optimizer": {"lr": 1e-3, "betas": [0.9, 0.95]},
    "training": {"max_steps": 4, "global_batch_size": 8, "mixed_precision": "no"},
    "sampling": {"guidance_interval": [0.0, 0.7]},
    "validation": {"class_labels": [1, "cat"]},
    "checkpoints": {"total_limit": 2},
}
VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    7,
    10**30,
    -(10**30),
    0.5,
    math.nan,
    math.inf,
    -math.inf,
    "",
    "null",
    "1e5",
    "nan",
    "ß 日本\u2028",
    "\x00",
    "a\nb",
    "${x} %s {}",
    "*a",
    [],
    [None],
    [1, 2, 3],
    [[1]],
    {},
    {"a": 1},
    {1: 2},
    {None: 1},
    {"name": None},
    {"name": ["mlp"]},
    {"class_path": "os.system", "init_args": {}},
    b"\x00\xff",
]
KEYS: list[Any] = ["x", "lr ", "Länge", 1, None, True, "a.b", "name", "", "base"]
BYTES = [b":", b"{", b"}", b"[", b"\t", b"&a ", b"*a", b"!!python/object/apply:os.system ", b"\x00", b"'", b'"', b"- "]
BYTES += [b"<<: ", b"\n", b"? ", b"|", b"%", b"!!binary ", b"!!set ", b"!!int ", b"!!timestamp ", b"\xff\xfe", b"#"]
TEXTS = ["", "null", "-1", "nan", "inf", "1e999", "10" * 40, "[", "{", "[1,2]", "{a: 1}", "{1: 2}", "true", "'", "ß"]
TEXTS += ["\x00", "--", "-", "@", "!!python/name:os.system", "*a", "&a [*a]", "0x10", "2020-13-45", "[[]]", "/", " "]
TEXTS += ["\n", "[null]"]


class _Hang(BaseException):
    pass


@contextmanager
def _time_limit() -> Iterator[None]:
    def expired(*_: object) -> None:
        raise _Hang

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(SECONDS_AT_MOST)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _outcome(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What came of it: "valid", "refused" or "printed"; anything else is an error of this test."""
    try:
        with _time_limit():
            config = parse_training_config(arguments)
    except SystemExit as leave:
        error = capsys.readouterr().err
        if leave.code == 0:
            return "printed"
        assert leave.code == 2
        assert error.startswith("error: ") and error.endswith((".\n", "?\n")) and error.count("\n") == 1, error
        return "refused"
    _check_valid(config)
    try:
        check_names(config)
    except ConfigurationError as refused:
        assert "\n" not in str(refused)
        return "refused"
    return "valid"


def _check_valid(config: TrainingConfig) -> None:
    config.validate()
    values = config.to_dict()
    assert all(math.isfinite(number) for number in _floats(values)), values
    assert isinstance(yaml.safe_load(yaml.safe_dump(values)), dict)


def _floats(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _floats(entry)
    elif isinstance(value, float):
        yield value


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    if isinstance(value, dict | list):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            found += _paths(entry, (*path, key))
    return found


def _mutated(rng: random.Random, values: dict[str, Any]) -> dict[str, Any]:
    """`values` with one to three places changed, removed, renamed or added to."""
    values = copy.deepcopy(values)
    for _ in range(rng.choice([1, 1, 2, 3])):
        path = rng.choice(_paths(values) or [("seed",)])
        parent: Any = values
        for key in path[:-1]:
            parent = parent[key]
        kind = rng.choice(["change"] * 5 + ["add", "remove", "rename"])
        if kind == "change" or not isinstance(parent, dict):
            parent[path[-1]] = copy.deepcopy(rng.choice(VALUES))
        elif kind == "add":
            parent[rng.choice(KEYS)] = copy.deepcopy(rng.choice(VALUES))
        elif kind == "remove":
            parent.pop(path[-1], None)
        else:
            parent[f"{path[-1]}x"] = parent.pop(path[-1], None)
    return values


def _garbled(rng: random.Random, text: bytes) -> bytes:
    """`text` with some bytes replaced, put in or cut out."""
    garbled = bytearray(text)
    for _ in range(rng.choice([1, 3, 12])):
        place = rng.randrange(len(garbled))
        kind = rng.choice(["replace", "insert", "cut"])
        if kind == "replace":
            garbled[place] = rng.randrange(256)
        elif kind == "insert":
            garbled[place:place] = rng.choice(BYTES)
        else:
            del garbled[place : place + rng.randrange(1, 20)]
    return bytes(garbled)


def test_the_starting_point_is_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(RICH))
    assert _outcome(["--config", str(tmp_path / "a.yaml")], capsys) == "valid"


def test_changed_values_and_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(f"values {SEED}")
    outcomes: set[str] = set()
    for number in range(ROUNDS):
        values = _mutated(rng, RICH)
        file = tmp_path / f"{number}.yaml"
        file.write_text(yaml.safe_dump(values, allow_unicode=True))
        outcomes.add(_outcome(["--config", str(file)], capsys))
    # If all were refused, nothing but the first check would have been looked at.
    assert outcomes >= {"valid", "refused"}


def test_garbled_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(f"bytes {SEED}")
    text = yaml.safe_dump(RICH).encode()
    outcomes: set[str] = set()
    # Few of them stay valid.
    for number in range(4 * ROUNDS):
        file = tmp_path / f"{number}.yaml"
        file.write_bytes(_garbled(rng, text))
        outcomes.add(_outcome(["--config", str(file)], capsys))
    assert outcomes >= {"valid", "refused"}


def test_command_lines(capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(f"options {SEED}")
    resolved = load_training_config(REQUIRED).to_dict()
    names = [".".join(path) for path in _paths(resolved) if all(isinstance(key, str) for key in path)]
    names += ["config", "variant", "alignment.terms.x", "alignment.taps.y", "teachers.a.grid", "xx", "data.x", ""]
    for _ in range(ROUNDS):
        arguments = list(REQUIRED)
        for _ in range(rng.choice([1, 2, 3])):
            name, text = rng.choice(names), rng.choice(TEXTS)
            arguments += rng.choice([[f"--{name}", text], [f"--{name}={text}"], [f"--{name}"], [text]])
        _outcome(arguments, capsys)


FILES = {
    "binary": b"\x89PNG\r\n\x1a\n\x00\x01",
    "utf-16": "seed: 1".encode("utf-16"),
    "scalar": b"3",
    "list": b"- 1",
    "two documents": b"seed: 1\n---\nseed: 2",
    "nested without end": b"alignment: {taps: " + b"[" * 3000 + b"]" * 3000 + b"}",
    "a mapping in itself": b"alignment: {taps: &x {a: *x}}",
    "aliases of aliases": b"alignment:\n  taps:\n    a: &a [1,1,1,1,1,1,1,1,1]\n"
    + b"".join(b"    %c: &%c [%s]\n" % (key + 1, key + 1, b",".join([b"*%c" % key] * 9)) for key in b"abcdefgh"),
    "a number of 6,000 digits": b"seed: " + b"9" * 6000,
    "an impossible date": b"seed: 2020-13-45",
    "no integer": b"seed: !!int x",
    "no float": b"optimizer: {lr: !!float x}",
    "no time": b"seed: !!timestamp x",
    "an object": b"seed: !!python/object/apply:os.system ['true']",
    "a list as key": b"? [1, 2]\n: 3",
    "null as section": b"optimizer: null",
    "null for a number": b"training: {max_steps: null}",
    "null for a probability": b"model: {class_dropout_prob: null}",
    "null for a name": b"flow: {path: null}",
    "null for a preset": b"model: {preset: null}",
    "infinite": b"optimizer: {lr: .inf}",
    "minus infinite": b"flow: {lognormal_mean: -.inf}",
    "not a number": b"alignment: {terms: {cosine: {weight: .nan}}}",
    "a seed beyond the generators": b"seed: 100000000000000000000",
    "a seed below the generators": b"validation: {seed: -100000000000000000000}",
    "no layers": b"model: {num_layers: 0}",
    "negative width": b"model: {mlp_ratio: -1.0}",
    "a label that is none": b"validation: {class_labels: [null]}",
    "a base that is missing": b"base: nowhere.yaml",
    "a base that is a folder": b"base: .",
    "a base that is a list": b"base: [a, b]",
    "a base without a name": b"base: ''",
    "a base with a zero byte": b'base: "\\0"',
    "a base of nobody": b"base: ~no-such-user/x",
    "a base in a circle": b"base: other.yaml",
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_cannot_work(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.yaml").write_text("base: file.yaml\n")
    (tmp_path / "file.yaml").write_bytes(FILES[name])
    assert _outcome([*REQUIRED, "--config", str(tmp_path / "file.yaml")], capsys) == "refused"


OPTIONS = {
    "no file": ["--config"],
    "a file without a name": ["--config", ""],
    "a file with a zero byte": ["--config", "\x00"],
    "a file with a line break": ["--config", "a\nb"],
    "a file of nobody": ["--config", "~no-such-user/x"],
    "a folder": ["--config", "/"],
    "a number of 6,000 digits": ["--seed", "9" * 6000],
    "nested without end": ["--alignment.taps.a", "[" * 3000 + "]" * 3000],
    "a list in itself": ["--alignment.taps.a", "&a [*a]"],
    "no value": ["--alignment.terms.cosine.weight"],
    "an unknown option": ["--länge", "3"],
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_cannot_work(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _outcome([*REQUIRED, *OPTIONS[name]], capsys) == "refused"
