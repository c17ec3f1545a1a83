"""Configuration from presets, files and the command line: order of merging, wrong input, the resolved whole."""

from pathlib import Path

import pytest
import yaml

from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.training.command_line import load_training_config, merge, parse_training_config


REQUIRED = ["--output_dir", "out", "--data.dataset", "images"]


def _write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_defaults_are_the_paper_s() -> None:
    config = load_training_config(REQUIRED)
    assert (config.optimizer.lr, config.optimizer.betas, config.optimizer.weight_decay) == (1e-4, (0.9, 0.999), 0.0)
    assert (config.training.global_batch_size, config.training.ema_decay) == (256, 0.9999)
    assert (config.training.mixed_precision, config.optimizer.max_grad_norm) == ("bf16", 1.0)
    assert config.model.class_dropout_prob == 0.1 and not config.data.horizontal_flip
    weights = {name: term["weight"] for name, term in config.alignment.terms.items()}
    assert weights == {"cosine": 1.0, "gram_mse": 2.0}


def test_later_files_win_and_the_command_line_wins_wherever_it_stands(tmp_path: Path) -> None:
    one = _write(tmp_path, "one.yaml", "optimizer: {lr: 1.0e-3, eps: 1.0e-6}\nseed: 1\n")
    two = _write(tmp_path, "two.yaml", "optimizer: {lr: 2.0e-3}\nseed: 2\n")
    config = load_training_config(["--seed", "9", *REQUIRED, "--config", one, "--config", two])
    assert (config.seed, config.optimizer.lr, config.optimizer.eps) == (9, 2e-3, 1e-6)
    config = load_training_config([*REQUIRED, "--config", two, f"--config={one}", "--optimizer.lr=5e-3"])
    assert (config.seed, config.optimizer.lr) == (1, 5e-3)


def test_base_files_lie_below_and_are_found_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    _write(tmp_path, "base.yaml", "seed: 1\ntraining: {max_steps: 7, global_batch_size: 4}\n")
    _write(tmp_path / "sub", "middle.yaml", "base: ../base.yaml\nseed: 2\n")
    top = _write(tmp_path / "sub", "top.yaml", "base: middle.yaml\ntraining: {max_steps: 8}\n")
    config = load_training_config([*REQUIRED, "--config", top])
    assert (config.seed, config.training.max_steps, config.training.global_batch_size) == (2, 8, 4)


def test_a_preset_lies_below_files_and_options(tmp_path: Path) -> None:
    file = _write(tmp_path, "a.yaml", "alignment: {preset: srepa-kl, terms: {gram_kl: {weight: 0.7}}}\n")
    options = ["--alignment.terms.gram_kl.objective.tau_student", "0.4", "--alignment.terms.cosine.weight", "3"]
    terms = load_training_config([*REQUIRED, "--config", file, *options]).alignment.terms
    assert terms["gram_kl"]["weight"] == 0.7
    assert terms["gram_kl"]["objective"] == {"name": "gram_kl", "tau_teacher": 0.2, "tau_student": 0.4}
    assert terms["cosine"]["weight"] == 3
    options = ["--alignment.terms.cosine.weight", "1e-3", "--alignment.projector.name", "linear"]
    alignment = load_training_config([*REQUIRED, *options]).alignment
    assert alignment.terms["cosine"]["weight"] == 1e-3 and alignment.projector == {"name": "linear"}


def test_null_removes_a_term_and_another_name_replaces_a_mapping(tmp_path: Path) -> None:
    file = _write(tmp_path, "a.yaml", "alignment: {terms: {cosine: null}, projector: {name: linear}}\n")
    alignment = load_training_config([*REQUIRED, "--config", file]).alignment
    assert alignment.terms["cosine"] is None and alignment.terms["gram_mse"]["weight"] == 2.0
    assert alignment.projector == {"name": "linear"}


def test_reg_brings_its_class_token_weight() -> None:
    assert load_training_config([*REQUIRED, "--alignment.preset", "reg"]).alignment.class_token_weight == 0.03
    assert load_training_config(REQUIRED).alignment.class_token_weight is None


def test_switches_need_no_value() -> None:
    config = load_training_config([*REQUIRED, "--push_to_hub", "--data.streaming", "--model.compile", "false"])
    assert config.push_to_hub and config.data.streaming and not config.model.compile


def test_a_resolved_configuration_resolves_to_itself(tmp_path: Path) -> None:
    config = load_training_config([*REQUIRED, "--alignment.preset", "irepa+srepa", "--teacher.grid", "[4,6]"])
    file = _write(tmp_path, "resolved.yaml", yaml.safe_dump(config.to_dict()))
    assert load_training_config(["--config", file]) == config
    config = load_training_config([*REQUIRED, "--alignment.terms.cosine", "null"])
    file = _write(tmp_path, "removed.yaml", yaml.safe_dump(config.to_dict()))
    assert load_training_config(["--config", file]) == config
    config = load_training_config([*REQUIRED, "--teacher.grid", "[4,6]"])
    assert config.teacher.grid == (4, 6)


def test_printing_shows_the_resolved_whole(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse_training_config(["--print_config", "--output_dir", "out"])
    assert exit_info.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["alignment"]["terms"]["gram_mse"]["weight"] == 2.0 and printed["output_dir"] == "out"


def test_help_names_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse_training_config(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert "--optimizer.lr" in text and "--config" in text and "Learning rate." in text


@pytest.mark.parametrize(
    "options, message",
    [
        (["--optimizer.lrr", "1"], "optimizer.lrr"),
        (["--optimizer.lr", "fast"], "optimizer.lr"),
        (["--training.mixed_precision", "fp8"], "mixed_precision"),
        (["--alignment.preset", "srepa-mes"], "srepa-mse"),
        (["--alignment.depth", "3", "--alignment.tap", "transformer_blocks.2"], "both given"),
        (["--alignment.depth", "0"], "alignment.depth is 0"),
        (["--flow.path", "quadratic"], "there is no path 'quadratic'"),
        (["--flow.timestep_law", "normal"], "timestep_law"),
        (["--training.global_batch_size", "0"], "training.global_batch_size is 0"),
        (["--training.max_steps", "-5"], "training.max_steps is -5"),
        (["--training.ema_decay", "1.0"], "training.ema_decay is 1.0"),
        (["--model.class_dropout_prob", "-0.1"], "class_dropout_prob"),
        (["--data.resolution", "0"], "data.resolution"),
        (["--data.streaming", "--data.latent_cache", "cache"], "latent cache"),
        (["--teacher.grid", "[0,4]"], "teacher.grid"),
        (["--config", "missing.yaml"], "missing.yaml cannot be read"),
        (["surplus"], "surplus"),
        (["--training.max_step", "3"], "max_step"),
        (["--seed", "-1"], "seed is -1"),
        (["--optimizer.eps", "-1"], "optimizer.eps is -1"),
        (["--alignment.terms.cosine.weight", "--data.streaming"], "alignment.terms.cosine.weight has no value"),
        (["--resume_from_checkpoint", "latest", "--overwrite_output_dir"], "both given"),
        (["--sampling.guidance_interval", "[0.8,0.2]"], "sampling.guidance_interval"),
        (["--validation.class_labels", "[]"], "validation.class_labels"),
    ],
)
def test_wrong_options_end_in_one_sentence(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse_training_config([*REQUIRED, *options])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    "text, message",
    [
        ("optimizer: {learning_rate: 1}", "there is no option optimizer.learning_rate"),
        ("optimiser: {lr: 1}", "did you mean 'optimizer'"),
        ("optimizer: 3", "section optimizer is 3"),
        ("- 1\n- 2\n", "not a mapping"),
        ("a: [1, 2", "not valid YAML"),
        ("base: self.yaml", "names itself"),
        ("training: {max_steps: many}", "training.max_steps"),
    ],
)
def test_wrong_files_end_in_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    file = _write(tmp_path, "self.yaml", text)
    with pytest.raises(ConfigurationError, match=message) as error:
        load_training_config([*REQUIRED, "--config", file])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("option, value", [("output_dir", "out"), ("data.dataset", "images")])
def test_what_every_run_needs_is_asked_for(option: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match="set --"):
        load_training_config([f"--{option}", value])


def test_merging_leaves_its_arguments_alone() -> None:
    under = {"a": {"b": 1, "c": [1]}, "d": 1}
    merged = merge(under, {"a": {"b": 2}, "d": {"e": 1}})
    assert merged == {"a": {"b": 2, "c": [1]}, "d": {"e": 1}}
    merged["a"]["c"].append(2)
    assert under == {"a": {"b": 1, "c": [1]}, "d": 1}
