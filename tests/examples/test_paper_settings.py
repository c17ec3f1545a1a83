"""Every configuration of examples/configs against docs/paper_settings.md, whose tables hold the paper's numbers.

Each row of the page is resolved through the real command line and compared as a whole: what the page states must be
there, and nothing else may differ from the defaults of a training run.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from diffusers_srepa.alignment.presets import METHOD_PRESETS, default_depth
from diffusers_srepa.alignment.registry import build_projector, build_terms
from diffusers_srepa.configuration.command_line import load_training_config
from diffusers_srepa.configuration.sweeps import read_variants
from diffusers_srepa.configuration.training import TrainingConfig
from diffusers_srepa.models.transformer_sit import SIT_PRESETS, SiTTransformer2DModel
from diffusers_srepa.schedulers.scheduling_flow_match_euler_maruyama import FlowMatchEulerMaruyamaScheduler


ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "examples/configs"
PAGE = ROOT / "docs/paper_settings.md"
NOTHING = "–"
SETTINGS = {
    *("model", "method", "resolution", "epochs", "steps", "w", "lambda_proj", "lambda_struct", "tau_t", "tau_s"),
    *("depth", "encoder"),
}
OBJECTIVES = {"MSE": "gram_mse", "KL": "gram_kl"}
PROJECTORS = {"MLP": "mlp", "conv": "conv"}


class Row(NamedTuple):
    """A row of a results table: its settings by column, the paper's results, and the run that has these settings."""

    table: str
    settings: dict[str, str]
    results: dict[str, str]
    config: str
    variant: str | None

    @property
    def run(self) -> tuple[str, str | None]:
        return self.config, self.variant

    def __str__(self) -> str:
        return f"{self.table.lower().replace(' ', '')}-{Path(self.config).stem}-{self.variant or 'plain'}"


def tables_by_heading() -> dict[str, list[list[str]]]:
    """The cells of the table under each heading of the page, the line of dashes left out."""
    found: dict[str, list[list[str]]] = {}
    heading = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            heading = line[3:].split(":")[0]
        elif line.startswith("|") and not line.startswith("| ---"):
            found.setdefault(heading, []).append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    return found


TABLES = tables_by_heading()
RESULT_TABLES = [f"Table {number}" for number in (1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13)]


def linked_file(cell: str) -> str:
    text, target = re.fullmatch(r"\[(.+)\]\((.+)\)", cell).groups()  # type: ignore[union-attr]
    assert (PAGE.parent / target).resolve() == CONFIGS / text, f"{text} is not what {target} leads to"
    return text


def read_rows() -> list[Row]:
    rows = []
    for table in RESULT_TABLES:
        head, *body = TABLES[table]
        for cells in body:
            assert len(cells) == len(head), cells
            row = dict(zip(head, cells, strict=True))
            config, variant = linked_file(row.pop("config")), row.pop("variant", NOTHING)
            results = {name: row.pop(name) for name in head if name.startswith("paper ")}
            rows.append(Row(table, row, results, config, None if variant == NOTHING else variant))
    return rows


ROWS = read_rows()
METHODS = {
    row["method"]: row for row in (dict(zip(TABLES["Methods"][0], r, strict=True)) for r in TABLES["Methods"][1:])
}
ENCODERS = {name: hub_id for name, hub_id, _ in TABLES["Encoders"][1:]}
TABLE_8 = {cells[0]: dict(zip(TABLES["Table 8"][0][1:], cells[1:], strict=True)) for cells in TABLES["Table 8"][1:]}
SHARED = {option: yaml.safe_load(value) for option, value, _ in TABLES["What all runs share"][1:]}
SIZES = [name for name in TABLES["Table 8"][0][1:]]


@cache
def resolve(config: str, variant: str | None, *options: str) -> TrainingConfig:
    arguments = ["--config", str(CONFIGS / config), "--output_dir", "out", *options]
    return load_training_config([*arguments, *(["--variant", variant] if variant else [])])


def number(text: str) -> float:
    """`"400K"` and `"7M"` are steps, `"–"` is a weight that is not there."""
    factors = {"K": 1e3, "M": 1e6}
    return 0.0 if text == NOTHING else float(text.rstrip("KM")) * factors.get(text[-1], 1)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and not prefix:
            flat |= flatten(value, f"{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def expected_terms(method: dict[str, str], settings: dict[str, str]) -> dict[str, Any]:
    """Alignment terms from the page alone: a method's weights unless the row has its own."""
    weights = {name: number(settings.get(name, method[name])) for name in ("lambda_proj", "lambda_struct")}
    terms: dict[str, Any] = {}
    if weights["lambda_proj"]:
        terms["cosine"] = {"objective": {"name": "cosine"}, "weight": weights["lambda_proj"]}
    if method["structural term"] != NOTHING:
        form, *temperatures = method["structural term"].split()
        objective: dict[str, Any] = {"name": OBJECTIVES[form]}
        if temperatures:
            usual = temperatures[0].split("/")
            objective["tau_teacher"] = number(settings.get("tau_t", usual[0]))
            objective["tau_student"] = number(settings.get("tau_s", usual[1]))
        terms[OBJECTIVES[form]] = {"objective": objective, "weight": weights["lambda_struct"]}
    return terms


def expected_options(settings: dict[str, str]) -> dict[str, Any]:
    """Every option that the page decides for a run, by dotted name."""
    method = METHODS[settings["method"]]
    options = dict(SHARED) | {
        "output_dir": "out",
        "model.preset": settings["model"],
        "training.max_steps": number(settings["steps"]),
        "alignment.preset": method["preset"],
        "alignment.terms": expected_terms(method, settings),
        "alignment.projector": None,
        "alignment.target_transform": None,
        "alignment.class_token_weight": number(method["class token weight"]) or None,
        "teacher.name_or_path": ENCODERS["DINOv2-B"],
    }
    if method["projector"] != NOTHING:
        name, size = method["projector"].split()
        key = {"MLP": "hidden_dim", "conv": "kernel_size"}[name]
        options["alignment.projector"] = {"name": PROJECTORS[name], key: int(size.split("x")[0])}
    if method["teacher tokens"] != NOTHING:
        alpha = float(method["teacher tokens"].removeprefix("spatial norm "))
        options["alignment.target_transform"] = {"name": "spatial_norm", "alpha": alpha}
    if settings.get("encoder", NOTHING) != NOTHING:
        options["teacher.name_or_path"] = ENCODERS[settings["encoder"]]
    if "resolution" in settings:
        options["data.resolution"] = int(settings["resolution"])
    if "w" in settings:
        options["sampling.guidance_scale"] = float(settings["w"])
    return options


def check(settings: dict[str, str], config: TrainingConfig) -> None:
    """A resolved run has what the page states, and the defaults of a training run everywhere else."""
    assert set(settings) <= SETTINGS
    found, defaults = flatten(config.to_dict()), flatten(TrainingConfig().to_dict())
    expected = expected_options(settings)
    for option, value in expected.items():
        assert found[option] == value, f"{option} is {found[option]!r}, but the page says {value!r}"
    sizes = SIT_PRESETS[config.model.preset]
    usual = default_depth(sizes["num_layers"], sizes["num_attention_heads"] * sizes["attention_head_dim"])
    depth = settings.get("depth") or TABLE_8["Alignment depth"][settings["model"].removesuffix("/2")]
    assert (config.alignment.depth or usual) == int(depth)
    if "epochs" in settings:
        assert number(settings["steps"]) == 5000 * int(settings["epochs"])
    for option in set(found) - set(expected) - {"alignment.depth"}:
        assert found[option] == defaults[option], f"{option} is {found[option]!r} and not on the page"


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_every_row_of_the_page_is_what_its_configuration_resolves_to(row: Row) -> None:
    check(row.settings, resolve(*row.run))
    assert row.results and all(re.fullmatch(r"\d+(\.\d+)?", value) for value in row.results.values())


@pytest.mark.parametrize("table", RESULT_TABLES)
def test_a_row_that_changes_is_noticed(table: str) -> None:
    """One setting of the page at a time, the configuration staying as it is."""
    row = next(row for row in reversed(ROWS) if row.table == table)
    others = {"model": "SiT-S/2", "method": "REG", "encoder": "MAE-L", "resolution": "128"}
    config = resolve(*row.run)
    for column in row.settings:
        changed = row.settings | {column: others.get(column, "3")}
        if changed["method"] == "REG":
            changed = {key: value for key, value in changed.items() if not key.startswith(("lambda", "tau"))}
        with pytest.raises((AssertionError, KeyError)):
            check(changed, config)


@pytest.mark.parametrize(
    "option",
    [
        ["--optimizer.lr", "2e-4"],
        ["--data.horizontal_flip"],
        ["--alignment.depth", "5"],
        ["--alignment.terms.cosine.weight", "0.6"],
        ["--alignment.terms.gram_mse.objective.include_prefix_tokens", "false"],
        ["--alignment.projector.hidden_dim", "1024"],
        ["--teacher.layer", "11"],
        ["--model.qk_norm"],
        ["--training.max_steps", "1"],
    ],
    ids=lambda option: option[0],
)
def test_a_configuration_that_changes_is_noticed(option: list[str]) -> None:
    row = next(row for row in ROWS if row.config == "sit-xl-2_256_srepa-mse.yaml")
    with pytest.raises(AssertionError):
        check(row.settings, resolve(*row.run, *option))


def test_page_and_folder_hold_the_same_runs() -> None:
    files = {path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml")}
    files -= {"quickstart.yaml", "base_imagenet_256.yaml", "base_imagenet_512.yaml"}
    runs = {
        (file, variant)
        for file in files
        for variant in (list(read_variants(CONFIGS / file, TrainingConfig)) or [None])
    }
    in_table_8 = {(linked_file(cell), None) for row in TABLE_8.values() for cell in row.values() if "](" in cell}
    assert {row.run for row in ROWS} | in_table_8 == runs


def test_rows_of_one_run_state_one_setting() -> None:
    """A run that several tables show must not be described in two ways."""
    descriptions: dict[tuple[str, str | None], Any] = {}
    for row in ROWS:
        options = expected_options(row.settings)
        assert descriptions.setdefault(row.run, options) == options, row


def test_the_names_of_plain_files_say_what_they_are() -> None:
    for file in sorted(CONFIGS.glob("sit-*.yaml")):
        size, resolution, preset = file.stem.split("_")
        config = resolve(file.name, None)
        assert config.model.preset == f"SiT-{size.split('-')[1].upper()}/{size[-1]}"
        assert (config.data.resolution, config.alignment.preset) == (int(resolution), preset)


@pytest.mark.parametrize("name", ["base_imagenet_256.yaml", "base_imagenet_512.yaml"])
def test_the_base_files_state_what_all_runs_share(name: str) -> None:
    found = flatten(resolve(name, None).to_dict())
    differing = {option for option, value in SHARED.items() if found[option] != value}
    assert differing == (set() if "256" in name else {"data.resolution", "sampling.guidance_scale"})


def test_the_methods_of_the_page_are_the_presets() -> None:
    assert [method["preset"] for method in METHODS.values()] == list(METHOD_PRESETS)
    # As the page of the paper: REPA's own weight, and Table 8.
    assert METHODS["REPA"]["lambda_proj"] == "0.5" and METHODS["sREPA-MSE"]["lambda_struct"] == "2.0"


@pytest.mark.parametrize("size", SIZES)
def test_table_8_models(size: str) -> None:
    table = {name: cells[size].replace(",", "") for name, cells in TABLE_8.items()}
    assert table["preset"] == f"{size}/2"
    config = resolve(linked_file(table["sREPA-MSE config"]), None)
    with torch.device("meta"):
        model = SiTTransformer2DModel.from_preset(config.model.preset, sample_size=config.data.resolution // 8)
    assert round(model.num_parameters() / 1e6) == pytest.approx(int(table["#Params"].removesuffix("M")), abs=1)
    side, _, channels = table["Input"].split("x")
    assert (model.config.sample_size, model.config.in_channels) == (int(side), int(channels))
    assert len(model.transformer_blocks) == int(table["Layers"])
    assert model.inner_dim == int(table["Hidden dim."]) and model.config.num_attention_heads == int(
        table["Num. heads"]
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", ["sREPA-MSE", "sREPA-KL"])
def test_table_8_training(size: str, method: str) -> None:
    table = {name: cells[size] for name, cells in TABLE_8.items()}
    config = resolve(linked_file(table[f"{method} config"]), None)
    check({"model": f"{size}/2", "method": method, "steps": "400K"}, config)
    structural = OBJECTIVES[method.removeprefix("sREPA-")]
    terms = build_terms(config.alignment.terms)
    weights = {name: term.schedule(0) for name, term in terms.items()}
    assert weights == {
        "cosine": float(table[f"{method} lambda_proj"]),
        structural: float(table[f"{method} lambda_struct"]),
    }
    # Equation 8, not the literal reduction of Algorithm 1.
    assert getattr(terms[structural].objective, "reduction", "mean") == "mean"
    assert config.teacher.name_or_path == ENCODERS[table["Encoder"]]
    assert config.training.global_batch_size == int(table["Batch size"])
    assert config.optimizer.lr == float(table["lr"])
    assert str(config.optimizer.betas) == table["betas"]
    assert config.sampling.num_inference_steps == int(table["Sampling steps"])
    assert {"EM": "euler-maruyama"}[table["Sampler"]] == config.sampling.scheduler
    assert (table["alpha_t"], table["sigma_t"], config.flow.path) == ("1 - t", "t", "linear")
    assert table["Training objective"] == "v-prediction" and table["Optimizer"] == "AdamW"
    # Discrepancy 9 of the page: the table's sigma, the code's 2 sigma.
    assert table["w_t"].startswith("sigma_t") and FlowMatchEulerMaruyamaScheduler().config.diffusion_scale == 2.0


def test_the_projector_of_a_method_is_built_as_the_page_says() -> None:
    shapes = {
        "sit-b-2_256_repa.yaml": [(2048, 768), (2048, 2048), (1024, 2048)],
        "sit-xl-2_256_irepa.yaml": [(1024, 1152, 3, 3)],
    }
    for file, expected in shapes.items():
        config = resolve(file, None)
        width = {"SiT-B/2": 768, "SiT-XL/2": 1152}[config.model.preset]
        assert config.alignment.projector is not None
        projector = build_projector(config.alignment.projector, width, 1024)
        assert [tuple(weight.shape) for weight in projector.parameters() if weight.ndim > 1] == expected


def test_discrepancies_are_numbered_and_referred_to() -> None:
    text = PAGE.read_text(encoding="utf-8")
    numbers = [row[0] for row in TABLES["Where the paper disagrees with itself or is silent"][1:]]
    assert numbers == [str(position) for position in range(1, len(numbers) + 1)]
    assert set(re.findall(r"discrepancy (\d+)", text)) <= set(numbers)
