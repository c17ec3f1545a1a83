"""Configuration from presets, files and the command line: order of merging, wrong input, the resolved whole."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffusers_srepa.alignment.presets import METHOD_PRESETS, alignment_preset, get_preset
from diffusers_srepa.alignment.registry import build_terms
from diffusers_srepa.configuration.command_line import load_training_config, parse_training_config
from diffusers_srepa.configuration.files import merge
from diffusers_srepa.configuration.sweeps import read_variants
from diffusers_srepa.configuration.training import TrainingConfig
from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.models.transformer_sit import SIT_PRESETS
from diffusers_srepa.training.methods.checks import check_names, explain_open_values


REQUIRED = ["--output_dir", "out", "--data.dataset", "images"]


def _write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_defaults_are_the_paper_s() -> None:
    config = load_training_config(REQUIRED)
    assert (config.optimizer.lr, config.optimizer.betas, config.optimizer.weight_decay) == (1e-4, (0.9, 0.999), 0.0)
    assert (config.training.global_batch_size, config.training.ema_decay) == (256, 0.9999)
    assert (config.training.mixed_precision, config.optimizer.max_grad_norm) == (None, 1.0)
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


# The numbers of the paper's Tables 3, 7 and 8, and of REPA, iREPA and REG: projector, teacher transform, class token
# weight, and the weights of the terms.
METHODS = {
    "sit": (None, None, None, {}),
    "repa": ("mlp", None, None, {"cosine": 0.5}),
    "irepa": ("conv", 0.6, None, {"cosine": 1.0}),
    "reg": ("mlp", None, 0.03, {"cosine": 0.5}),
    "srepa-mse": ("mlp", None, None, {"cosine": 1.0, "gram_mse": 2.0}),
    "srepa-kl": ("mlp", None, None, {"cosine": 1.0, "gram_kl": 0.5}),
    "structure-mse": ("mlp", None, None, {"gram_mse": 4.0}),
    "structure-kl": ("mlp", None, None, {"gram_kl": 0.5}),
    "irepa+srepa": ("conv", 0.6, None, {"cosine": 1.0, "gram_mse": 2.0}),
    "reg+srepa": ("mlp", None, 0.03, {"cosine": 0.5, "gram_mse": 2.0}),
}


def _print_config(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[dict[str, Any], str]:
    with pytest.raises(SystemExit) as exit_info:
        parse_training_config(["--print_config", *options], explain_open_values)
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    return yaml.safe_load(text), text


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_reachable_by_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    projector, alpha, class_token_weight, weights = METHODS[name]
    assert set(METHODS) == set(METHOD_PRESETS)
    assert {term: values["weight"] for term, values in get_preset(name).terms.items()} == weights
    alignment = _print_config(capsys, "--alignment.preset", name)[0]["alignment"]
    assert {key: alignment[key] for key in alignment_preset(name)} == alignment_preset(name)
    assert {term: values["weight"] for term, values in alignment["terms"].items()} == weights
    assert (alignment["projector"] or {}).get("name") == projector
    assert (alignment["target_transform"] or {}).get("alpha") == alpha
    assert alignment["class_token_weight"] == class_token_weight
    built = build_terms(load_training_config([*REQUIRED, "--alignment.preset", name]).alignment.terms)
    assert {term: built[term].schedule(0) for term in built} == weights


@pytest.mark.parametrize("name", SIT_PRESETS)
def test_every_size_is_reachable_by_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    printed, text = _print_config(capsys, "--model.preset", name)
    assert printed["model"]["preset"] == name
    for option, value in SIT_PRESETS[name].items():
        assert f"#   model.{option}: {value}\n" in text
    depth = {"S": 4, "B": 4, "L": 8, "XL": 8}[name[4:-2]]
    assert text.endswith(f"#   alignment.depth: {depth}\n")


def test_printing_names_only_what_is_open(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    given = ["--model.patch_size", "4", "--model.num_layers", "6", "--model.num_attention_heads", "2"]
    _, text = _print_config(capsys, *given, "--model.attention_head_dim", "8")
    assert text.endswith("presets:\n#   alignment.depth: 2\n")
    _, text = _print_config(capsys, "--model.num_layers", "6", "--alignment.depth", "3")
    assert "num_layers: 6\n" in text and "#   model.num_layers" not in text and "alignment.depth" not in text
    assert "alignment.depth" not in _print_config(capsys, "--alignment.preset", "sit")[1]
    assert "those of me/sit.\n" in _print_config(capsys, "--model.init_from", "me/sit")[1]
    # What is printed is a configuration file.
    _, text = _print_config(capsys, *REQUIRED, "--model.preset", "SiT-B/4")
    file = _write(tmp_path, "printed.yaml", text)
    assert load_training_config(["--config", file]) == load_training_config([*REQUIRED, "--model.preset", "SiT-B/4"])


@pytest.mark.parametrize("option", ["--alignment.preset=reag+srepa", "--model.preset=SiT-B-2"])
def test_unknown_presets_are_found_while_printing_too(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse_training_config(["--print_config", option], explain_open_values)
    assert exit_info.value.code == 2
    assert "did you mean 'reg+srepa'" in (error := capsys.readouterr().err) or "did you mean 'SiT-B/2'" in error


SWEEP = """
base: base.yaml
seed: 1
optimizer: {lr: 1.0e-3, eps: 1.0e-6}
sweep:
  plain:
  fast: {optimizer: {lr: 2.0e-3}, seed: 5}
  repa: {alignment: {preset: repa, terms: {cosine: {weight: 0.7}}}}
"""


@pytest.fixture
def sweep(tmp_path: Path) -> str:
    _write(tmp_path, "base.yaml", "seed: 0\ntraining: {max_steps: 7}\nalignment: {preset: srepa-kl}\n")
    return _write(tmp_path, "sweep.yaml", SWEEP)


def test_a_variant_lies_over_its_file_and_below_later_files_and_options(sweep: str, tmp_path: Path) -> None:
    later = _write(tmp_path, "later.yaml", "seed: 8\n")
    plain = load_training_config([*REQUIRED, "--config", sweep, "--variant", "plain"])
    assert (plain.seed, plain.optimizer.lr, plain.training.max_steps) == (1, 1e-3, 7)
    assert list(plain.alignment.terms) == ["cosine", "gram_kl"]
    fast = load_training_config([*REQUIRED, "--variant=fast", "--config", sweep])
    assert (fast.seed, fast.optimizer.lr, fast.optimizer.eps) == (5, 2e-3, 1e-6)
    assert load_training_config([*REQUIRED, "--config", sweep, "--config", later, "--variant", "fast"]).seed == 8
    # The order of the files decides, not that of the options.
    assert load_training_config([*REQUIRED, "--variant", "fast", "--config", later, "--config", sweep]).seed == 5
    options = ["--seed", "9", "--config", sweep, "--config", later, "--variant", "fast"]
    assert load_training_config([*REQUIRED, *options]).seed == 9
    repa = load_training_config([*REQUIRED, "--config", sweep, "--variant", "repa"]).alignment
    assert repa.preset == "repa" and {name: term["weight"] for name, term in repa.terms.items()} == {"cosine": 0.7}


def test_the_variants_of_a_file_are_listed_in_code(sweep: str, tmp_path: Path) -> None:
    variants = read_variants(sweep, TrainingConfig)
    assert list(variants) == ["plain", "fast", "repa"]
    assert variants["fast"] == {"optimizer": {"lr": 2e-3}, "seed": 5} and variants["plain"] == {}
    assert read_variants(tmp_path / "base.yaml", TrainingConfig) == {}


def test_a_sweep_as_base_lends_its_variants(sweep: str, tmp_path: Path) -> None:
    mine = _write(tmp_path, "mine.yaml", "base: sweep.yaml\nseed: 3\nsweep: {slow: {optimizer: {lr: 1.0e-5}}}\n")
    assert list(read_variants(mine, TrainingConfig)) == ["plain", "fast", "repa", "slow"]
    config = load_training_config([*REQUIRED, "--config", mine, "--variant", "slow"])
    assert (config.seed, config.optimizer.lr, config.optimizer.eps) == (3, 1e-5, 1e-6)
    # The variant is laid over the file that names the base, not over the base alone.
    assert load_training_config([*REQUIRED, "--config", mine, "--variant", "fast"]).seed == 5


@pytest.mark.parametrize(
    "variant, message",
    [
        (
            "fsat",
            "there is no variant 'fsat' in .*sweep.yaml, did you mean 'fast'. the variants are plain, fast, repa.",
        ),
        ("nothing like it", "there is no variant 'nothing like it' in .*: the variants are plain, fast, repa."),
    ],
)
def test_an_unknown_variant_is_answered_with_their_names(sweep: str, variant: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as error:
        load_training_config([*REQUIRED, "--config", sweep, "--variant", variant])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: {optimizer: {lrr: 1}}", "in the variant 'a' of .*wrong.yaml, there is no option optimizer.lrr"),
        ("b: {seed: 1}\n  a: {sede: 1}", "in the variant 'a' .*, there is no option sede, did you mean 'seed'"),
        ("a: {base: base.yaml}", "in the variant 'a' .*, there is no option base"),
        ("a: {alignment: {terms: {gram_mse: {objective: {nmae: x}}}}}", "has no argument 'nmae'"),
    ],
)
def test_a_typing_error_in_any_variant_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    file = _write(tmp_path, "wrong.yaml", f"sweep:\n  {text}\n")
    chosen = "b" if text.startswith("b") else "a"
    with pytest.raises(ConfigurationError, match=message):
        check_names(load_training_config([*REQUIRED, "--config", file, "--variant", chosen], validate=False))


def test_two_sweeps_at_once_are_refused(sweep: str, tmp_path: Path) -> None:
    other = _write(tmp_path, "other.yaml", "sweep: {fast: {}}\n")
    with pytest.raises(ConfigurationError, match="sweep.yaml and .*other.yaml are both sweeps"):
        load_training_config([*REQUIRED, "--config", sweep, "--config", other, "--variant", "fast"])


def test_printing_shows_the_chosen_variant(sweep: str, capsys: pytest.CaptureFixture[str]) -> None:
    printed, _ = _print_config(capsys, "--config", sweep, "--variant", "repa")
    assert printed["alignment"]["terms"] == {"cosine": {"objective": {"name": "cosine"}, "weight": 0.7}}
    assert printed["optimizer"]["lr"] == 1e-3 and "sweep" not in printed and "variant" not in printed


def test_help_names_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse_training_config(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert "--optimizer.lr" in text and "--config" in text and "--variant" in text and "Learning rate." in text


@pytest.mark.parametrize(
    "options, message",
    [
        (["--optimizer.lrr", "1"], "optimizer.lrr"),
        (["--optimizer.lr", "fast"], "optimizer.lr"),
        (["--training.mixed_precision", "fp8"], "mixed_precision"),
        (["--alignment.preset", "srepa-mes"], "srepa-mse"),
        (["--model.preset", "SiT-XXL/2"], "did you mean 'SiT-XL/2'"),
        (["--variant", "a"], "--config names no sweep (no file)"),
        (["--alignment.terms.gram_mes.weight", "1"], "did you mean 'gram_mse'"),
        (["--alignment.terms.gram_mse.wieght", "1"], "did you mean 'weight'"),
        (["--alignment.depth", "3", "--alignment.tap", "transformer_blocks.2"], "both given"),
        (["--alignment.depth", "0"], "alignment.depth is 0"),
        (["--flow.path", "quadratic"], "flow.path is 'quadratic', but must be one of linear, cosine."),
        (["--flow.timestep_sampling", "normal"], "flow.timestep_sampling is 'normal'"),
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
        (["--optimizer.lr", "abc"], "option optimizer.lr is 'abc', but must be a number."),
        (["--training.max_steps", "1.5"], "option training.max_steps is 1.5, but must be a whole number."),
        (["--training.mixed_precision", "bf61"], "must be one of bf16, fp16, no."),
        (["--data.streaming", "maybe"], "option data.streaming is 'maybe', but must be true or false."),
        (["--teacher.grid", "4"], "option teacher.grid is [4], but must be a list of 2 numbers."),
        (["--method", "repa-e"], "there is no method 'repa-e'"),
        (["--lr", "1"], "there is no option --lr: here it is --optimizer.lr."),
        (["--every", "1"], "did you mean '--validation.every' or '--checkpoints.every'?"),
        (["--flow.timestep_law", "uniform"], "here it is --flow.timestep_sampling."),
        (["--data.dataset", "a", "b"], "option data.dataset takes one value, but is followed by a, b."),
    ],
)
def test_wrong_options_end_in_one_sentence(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        check_names(parse_training_config([*REQUIRED, *options]))
    except ConfigurationError as refused:
        # What only the models' code can tell is refused when the trainer is built.
        error = f"error: {refused}\n"
    except SystemExit as leave:
        assert leave.code == 2
        error = capsys.readouterr().err
    else:
        pytest.fail("this was not refused")
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error


# Options of the training scripts of diffusers, and where they are here.
OF_DIFFUSERS = {
    "learning_rate": "optimizer.lr",
    "lr_scheduler": "optimizer.lr_schedule",
    "lr_warmup_steps": "optimizer.lr_warmup_steps",
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "adam_weight_decay": "optimizer.weight_decay",
    "adam_epsilon": "optimizer.eps",
    "max_grad_norm": "optimizer.max_grad_norm",
    "max_train_steps": "training.max_steps",
    "num_train_epochs": "training.max_steps",
    "train_batch_size": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size",
    "mixed_precision": "training.mixed_precision",
    "allow_tf32": "training.allow_tf32",
    "use_ema": "training.ema_decay",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "pretrained_model_name_or_path": "model.init_from",
    "pretrained_vae_model_name_or_path": "latents.vae",
    "dataset_name": "data.dataset",
    "dataset_config_name": "data.name",
    "train_data_dir": "data.dataset",
    "image_column": "data.image_column",
    "cache_dir": "data.cache_dir",
    "resolution": "data.resolution",
    "random_flip": "data.horizontal_flip",
    "dataloader_num_workers": "data.num_workers",
    "checkpointing_steps": "checkpoints.every",
    "checkpoints_total_limit": "checkpoints.total_limit",
    "validation_prompt": "validation.class_labels",
    "validation_prompts": "validation.class_labels",
    "validation_steps": "validation.every",
    "num_validation_images": "validation.num_images",
    "guidance_scale": "sampling.guidance_scale",
    "report_to": "tracking.report_to",
    "tracker_project_name": "tracking.project_name",
    "logging_dir": "output_dir",
}


@pytest.mark.parametrize("name", OF_DIFFUSERS)
def test_options_of_diffusers_scripts_are_answered_with_their_name_here(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as error:
        load_training_config([*REQUIRED, f"--{name}", "1"])
    assert str(error.value) == f"there is no option --{name}: here it is --{OF_DIFFUSERS[name]}."
    file = _write(tmp_path, "a.yaml", f"{name}: 1\n")
    with pytest.raises(ConfigurationError, match=f"there is no option {name}: here it is {OF_DIFFUSERS[name]}."):
        load_training_config([*REQUIRED, "--config", file])


def test_numbers_may_be_written_as_powers_of_ten_everywhere(tmp_path: Path) -> None:
    file = _write(tmp_path, "a.yaml", "optimizer: {lr: 1e-3, betas: [0.9, 95e-2]}\ntraining: {max_steps: 1e5}\n")
    config = load_training_config([*REQUIRED, "--config", file, "--training.log_every", "1e2"])
    assert (config.optimizer.lr, config.optimizer.betas) == (1e-3, (0.9, 0.95))
    assert (config.training.max_steps, config.training.log_every) == (100_000, 100)


def test_a_bare_no_and_a_bare_name_are_understood(tmp_path: Path) -> None:
    file = _write(tmp_path, "a.yaml", "training: {mixed_precision: no}\nalignment: {projector: conv}\n")
    config = load_training_config([*REQUIRED, "--config", file])
    assert config.training.mixed_precision == "no" and config.alignment.projector == {"name": "conv"}
    # The preset's projector under its own name keeps the preset's arguments.
    mlp = load_training_config([*REQUIRED, "--alignment.projector", "mlp"]).alignment.projector
    assert mlp == {"name": "mlp", "hidden_dim": 2048}
    options = ["--alignment.projector", "conv", "--alignment.projector.kernel_size", "1"]
    assert load_training_config([*REQUIRED, *options]).alignment.projector == {"name": "conv", "kernel_size": 1}


def test_several_values_may_follow_an_option() -> None:
    config = load_training_config([*REQUIRED, "--validation.class_labels", "cat", "3", "--teacher.grid", "4", "6"])
    assert config.validation.class_labels == ["cat", 3] and config.teacher.grid == (4, 6)


def test_former_names_in_files_are_read(tmp_path: Path) -> None:
    old = _write(tmp_path, "old.yaml", "flow: {timestep_law: lognormal}\n")
    new = _write(tmp_path, "new.yaml", "flow: {timestep_sampling: uniform}\n")
    over = _write(tmp_path, "over.yaml", "base: new.yaml\nflow: {timestep_law: lognormal}\n")
    assert load_training_config([*REQUIRED, "--config", old]).flow.timestep_sampling == "lognormal"
    assert load_training_config([*REQUIRED, "--config", old, "--config", new]).flow.timestep_sampling == "uniform"
    assert load_training_config([*REQUIRED, "--config", over]).flow.timestep_sampling == "lognormal"


@pytest.mark.parametrize(
    "text, message",
    [
        ("optimizer: {learning_rate: 1}", "there is no option optimizer.learning_rate: here it is optimizer.lr."),
        ("optimiser: {lr: 1}", "did you mean 'optimizer'"),
        ("optimizer: 3", "section optimizer is 3"),
        ("- 1\n- 2\n", "not a mapping"),
        ("a: [1, 2", "not valid YAML"),
        ("base: self.yaml", "names itself"),
        ("training: {max_steps: many}", "training.max_steps"),
        ("seed: 1\ntraining: {max_steps: 1}\nseed: 2\n", "the key 'seed' is given twice"),
        ("sweep: {a: {seed: 1}, a: {seed: 2}}", "the key 'a' is given twice"),
        ("sweep: {a: {seed: 1}, b: {}}", "is a sweep: choose one of its runs with --variant, which are a, b"),
        ("sweep: [a, b]", "must be a mapping of variant names"),
        ("sweep: {}", "must be a mapping of variant names"),
        ("sweep: {0.5: {seed: 1}}", "variant name 0.5 .* is no text"),
        ("sweep: {a: 3}", "the variant 'a' .* is 3, but must be a mapping"),
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


def test_the_examples_of_the_documentation(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    shutil.copytree(root / "examples/configs", tmp_path / "configs")
    page = (root / "docs/training.md").read_text(encoding="utf-8")
    run, sweep = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    my_run = _write(tmp_path / "configs", "my_run.yaml", run)
    alignment = load_training_config([*REQUIRED, "--config", my_run]).alignment
    assert (alignment.preset, alignment.depth, alignment.projector) == ("repa", 6, {"name": "linear"})
    assert build_terms(alignment.terms)["cosine"].schedule.stop_step == 100_000
    my_sweep = _write(tmp_path / "configs", "my_sweep.yaml", sweep)
    assert list(read_variants(my_sweep, TrainingConfig)) == re.findall(r"for variant in (.*); do", page)[0].split()
    assert load_training_config([*REQUIRED, "--config", my_sweep, "--variant", "depth_6"]).alignment.depth == 6
    (code,) = re.findall(r"```python\n(.*?)```", page.split("### Presets")[1].split("###")[0], re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/training.md", "exec"), names)
    assert list(names["terms"]) == ["cosine", "gram_mse"] and len(names["transformer"].transformer_blocks) == 12
    assert all(term.target_transform is not None for term in names["terms"].values())
    listed = page.split("### Presets")[1].split("###")[0]
    assert all(f"`{name}`" in listed for name in METHOD_PRESETS)


def test_a_preset_over_a_resolved_file_removes_no_term(tmp_path: Path) -> None:
    file = _write(tmp_path, "resolved.yaml", yaml.safe_dump(load_training_config(REQUIRED).to_dict()))
    terms = load_training_config(["--config", file, "--alignment.preset", "srepa-kl"]).alignment.terms
    assert {name: term["weight"] for name, term in terms.items()} == {"cosine": 1.0, "gram_kl": 0.5, "gram_mse": 2.0}
