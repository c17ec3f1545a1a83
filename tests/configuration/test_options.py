"""Options declared once: what a field's metadata means, methods of their own, other commands, no heavy imports."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from diffusers_srepa.configuration.command_line import (
    METHODS,
    load_config,
    load_training_config,
    parse_config,
    parse_training_config,
)
from diffusers_srepa.configuration.comparison import differing_options
from diffusers_srepa.configuration.options import Options, option, options_of, walk
from diffusers_srepa.configuration.training import RunConfig, TrainingConfig
from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.interpolant import TIMESTEP_SAMPLINGS, get_interpolant


REQUIRED = ["--output_dir", "out", "--data.dataset", "images"]
FORMAT_1 = Path(__file__).resolve().parents[1] / "fixtures/format_1/run/checkpoint-2/config.yaml"


@dataclass
class ListenConfig(Options):
    """A command of its own."""

    place: str = option(help="Where.")
    loud: bool = option(False, "Whether.")
    times: int = option(3, "How often.", minimum=1, also=("repetitions",))
    names: list[str] | None = option(None, "Whom.")
    size: tuple[int, int] | None = option(None, "How large.", minimum=1)


def test_any_command_has_the_same_face(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text("place: here\ntimes: 5\n")
    config = load_config(["--config", str(tmp_path / "a.yaml"), "--loud", "--names", "10", "b"], ListenConfig)
    assert config == ListenConfig("here", loud=True, times=5, names=["10", "b"])
    assert load_config(["--place", "x", "--size", "3", "4"], ListenConfig).size == (3, 4)
    with pytest.raises(SystemExit) as leave:
        parse_config(["--help"], ListenConfig, "listen", "Listens.")
    text = capsys.readouterr().out
    assert leave.value.code == 0 and "usage: listen [options]" in text and "How often. (default: 3)" in text
    assert "--config" in text and "--print_config" not in text


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "no place is given: set --place."),
        (["--place", "x", "--times", "0"], "times is 0, but must be at least 1."),
        (["--place", "x", "--size", "3", "0"], "size[1] is 0, but must be at least 1."),
        (["--place", "x", "--repetitions", "0"], "there is no option --repetitions: here it is --times."),
        (["--place", "x", "--print_config"], "there is no option --print_config"),
    ],
)
def test_wrong_options_of_any_command(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        parse_config(options, ListenConfig)
    assert leave.value.code == 2 and message in capsys.readouterr().err


@dataclass
class OtherMethod(RunConfig):
    """A method with an option of its own."""

    patience: int = option(2, "How long.", minimum=0)


def test_a_method_brings_its_own_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = {**METHODS, "other": OtherMethod}
    config = load_training_config([*REQUIRED, "--method", "other", "--patience", "4"], methods=methods)
    assert isinstance(config, OtherMethod) and config.patience == 4 and config.method == "other"
    (tmp_path / "a.yaml").write_text("method: other\nsweep: {a: {patience: 3}, b: {}}\n")
    config = load_training_config([*REQUIRED, "--config", str(tmp_path / "a.yaml"), "--variant", "a"], methods=methods)
    assert isinstance(config, OtherMethod) and config.patience == 3
    with pytest.raises(ConfigurationError, match="there is no option --alignment.depth"):
        load_training_config([*REQUIRED, "--method", "other", "--alignment.depth", "4"], methods=methods)
    with pytest.raises(ConfigurationError, match="no method 'othre', did you mean 'other'"):
        load_training_config([*REQUIRED, "--method", "othre"], methods=methods)
    with pytest.raises(SystemExit):
        parse_training_config(["--method", "other", "--help"], methods=methods)
    assert "--patience" in (text := capsys.readouterr().out) and "--alignment" not in text


def test_every_option_has_help_and_foreign_names_are_no_options() -> None:
    options = options_of(TrainingConfig)
    assert [name for name, declared in options.items() if not declared.help] == []
    last_parts = {name.rpartition(".")[2] for name in options}
    foreign = [name for declared in options.values() for name in declared.also]
    assert len(foreign) == len(set(foreign)) and set(foreign) & set(options) == set()
    assert set(foreign) & last_parts == {"batch_size"}


def test_choices_are_those_of_the_code() -> None:
    options = options_of(TrainingConfig)
    assert options["flow.timestep_sampling"].choices == TIMESTEP_SAMPLINGS
    assert [get_interpolant(name).name for name in options["flow.path"].choices or ()] == ["linear", "cosine"]
    with pytest.raises(ConfigurationError, match="quadratic"):
        get_interpolant("quadratic")


def test_ranges_are_looked_at_in_further_teachers_too() -> None:
    with pytest.raises(ConfigurationError, match=r"teachers.clip.grid\[1\] is 0, but must be at least 1."):
        load_training_config([*REQUIRED, "--teachers.clip.grid", "[4,0]"])
    config = load_training_config([*REQUIRED, "--teachers.clip.name_or_path", "123"])
    assert {name: value for name, _, value in walk(config)}["teachers.clip.name_or_path"] == "123"


# What may change without making another run of it.
FREE = """output_dir resume_from_checkpoint resume_with_changes overwrite_output_dir expected_processes push_to_hub
hub_model_id hub_private hub_license model.gradient_checkpointing model.compile model.init_from data.dataset
data.data_dir data.cache_dir data.latent_cache data.num_workers training.max_steps training.micro_batch_size
training.log_every"""
FREE_SECTIONS = ("sampling", "validation", "checkpoints", "tracking")


def test_what_may_change_when_a_run_is_resumed() -> None:
    free = {name for name, declared in options_of(TrainingConfig).items() if declared.resume}
    assert {name for name in free if name.partition(".")[0] not in FREE_SECTIONS} == set(FREE.split())
    assert all(name in free for name in options_of(TrainingConfig) if name.partition(".")[0] in FREE_SECTIONS)


def test_differences_are_named_with_both_values() -> None:
    before, now = (load_training_config([*REQUIRED, *options]) for options in ([], ["--optimizer.lr", "1e-3"]))
    now.alignment.terms["cosine"]["weight"] = 3.0
    now.training.max_steps = now.checkpoints.every = 7
    assert differing_options(before.to_dict(), now.to_dict(), TrainingConfig) == [
        "alignment.terms.cosine.weight was 1.0 and is 3.0",
        "optimizer.lr was 0.0001 and is 0.001",
    ]


def test_a_configuration_of_before_is_compared_under_today_s_names() -> None:
    before = yaml.safe_load(FORMAT_1.read_text())
    assert "timestep_law" in before["flow"] and "method" not in before
    now = load_training_config(["--config", str(FORMAT_1)])
    assert differing_options(before, now.to_dict(), TrainingConfig) == []
    now.flow.timestep_sampling = "lognormal"
    assert differing_options(before, now.to_dict(), TrainingConfig) == [
        "flow.timestep_sampling was uniform and is lognormal"
    ]


@pytest.mark.parametrize("arguments", [REQUIRED, ["--help"], ["--optimizer.lrr", "1"], ["--print_config"]])
def test_nothing_heavy_is_imported(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        "from diffusers_srepa.configuration.command_line import parse_training_config\n"
        "try:\n    parse_training_config(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'accelerate', 'diffusers', 'transformers', 'datasets', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
