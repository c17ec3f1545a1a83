"""The Python blocks of README.md, docs/alignment.md, teachers.md and training.md run, those of other pages compile.

Names of the Hub are folders of the working directory here, with tiny checkpoints of the same classes, so that the
blocks run unchanged and offline. Those of docs/hub.md run in tests/hub.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from diffusers import DiTTransformer2DModel, SD3Transformer2DModel, UNet2DModel
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

from diffusers_srepa import ConfigurationError, SiTPipeline
from diffusers_srepa.alignment.registry import OBJECTIVES, PROJECTORS, build_terms
from diffusers_srepa.alignment.schedule import HardStop
from diffusers_srepa.alignment.term import AlignmentTerm
from diffusers_srepa.configuration.command_line import load_training_config
from diffusers_srepa.models import presets
from diffusers_srepa.models.transformer_sit import SIT_PRESETS
from diffusers_srepa.teachers import families
from diffusers_srepa.tokens import TokenMap
from tests.helpers.aligned_step import PlainTransformer
from tests.helpers.tiny_pipeline import tiny_pipeline
from tests.helpers.tiny_run import write_assets
from tests.helpers.toy_method import ToyTransformer
from tests.test_architecture import LEVELS


ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    path.relative_to(ROOT).as_posix()
    for folder in (".", "docs", "examples", "benchmarks", "model_cards")
    for path in sorted((ROOT / folder).glob("**/*.md" if folder != "." else "*.md"))
]
KEY = ("default", "default")


class Block(NamedTuple):
    """A fenced block of a page, with its first line's number and the last heading before it."""

    heading: str
    line: int
    code: str


def read_blocks(page: str, language: str = "python") -> list[Block]:
    """The fenced blocks of one language."""
    blocks: list[Block] = []
    heading, code, start, inside = "", [], 0, None
    for number, line in enumerate((ROOT / page).read_text().splitlines(), start=1):
        if inside is None and line.startswith("```"):
            inside, code, start = line[3:].strip(), [], number + 1
        elif line.startswith("```"):
            if inside == language:
                blocks.append(Block(heading, start, "\n".join(code) + "\n"))
            inside = None
        elif inside is not None:
            code.append(line)
        elif re.match(r"#+ ", line):
            heading = line.lstrip("# ").strip()
    return blocks


def run(page: str, block: Block, namespace: dict[str, Any]) -> None:
    """Execute a block; a traceback shows the page's own line numbers."""
    exec(compile("\n" * (block.line - 1) + block.code, str(ROOT / page), "exec"), namespace)


def write_checkpoints(folder: Path) -> None:
    """Tiny models under the Hub ids that the pages name."""
    torch.manual_seed(0)
    dino = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=56)
    Dinov2Model(dino).save_pretrained(folder / "facebook/dinov2-base")
    tower = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**tower, "image_size": 56, "patch_size": 14}
    clip = CLIPConfig(text_config={**tower, "vocab_size": 30}, vision_config=vision, projection_dim=8)
    CLIPModel(clip).save_pretrained(folder / "openai/clip-vit-large-patch14")
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 8, "patch_size": 2, "in_channels": 4}
    dit = DiTTransformer2DModel(**heads, out_channels=8, sample_size=32, num_embeds_ada_norm=10)
    dit.save_pretrained(folder / "facebook/DiT-XL-2-256/transformer")
    joint = {"joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 10}
    # Its last block returns no text, so the one that the page taps must not be the last.
    heads["num_layers"] = 9
    sd3 = SD3Transformer2DModel(**heads, **joint, out_channels=4, sample_size=32, pos_embed_max_size=16)
    sd3.save_pretrained(folder / "stabilityai/stable-diffusion-3.5-medium/transformer")
    unet = UNet2DModel(
        sample_size=32,
        block_out_channels=(8, 8, 8, 16),
        down_block_types=("DownBlock2D",) * 4,
        up_block_types=("UpBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
    )
    unet.save_pretrained(folder / "google/ddpm-cifar10-32")
    tiny_pipeline().save_pretrained(folder / "me/sit-xl-2-srepa")


@pytest.fixture(scope="module", autouse=True)
def _working_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("hub")
    write_checkpoints(folder)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("page", PAGES)
def test_the_python_blocks_of_every_page_compile(page: str):
    for block in read_blocks(page):
        compile(block.code, f"{page}:{block.line}", "exec")


# docs/alignment.md


@pytest.fixture(scope="module")
def sections() -> dict[str, list[dict[str, Any]]]:
    """What the names of docs/alignment.md stand for after each block, by heading."""
    torch.manual_seed(0)
    namespace: dict[str, Any] = {
        "student_tokens": torch.randn(2, 16, 6),
        "teacher_tokens": torch.randn(2, 16, 9),
        "images": torch.rand(2, 3, 256, 256),
        "latents": torch.randn(2, 4, 32, 32),
        "labels": torch.tensor([1, 7]),
        "sd3_x_t": torch.randn(2, 4, 32, 32),
        # As many tokens of text as of the image, so that taking one for the other would go unnoticed.
        "prompt_embeds": torch.randn(2, 256, 12),
        "pooled_prompt_embeds": torch.randn(2, 10),
    }
    found: dict[str, list[dict[str, Any]]] = {}
    for block in read_blocks("docs/alignment.md"):
        run("docs/alignment.md", block, namespace)
        found.setdefault(block.heading, []).append(dict(namespace))
    return found


def values_of(names: dict[str, Any]) -> set[str]:
    """The terms of the last alignment; its loss must be their weighted sum and have a gradient."""
    alignment = names["alignment"]
    expected = sum(alignment.weights[name] * value.item() for name, value in alignment.values.items())
    assert alignment.loss.item() == pytest.approx(expected, abs=1e-6) and alignment.loss.requires_grad
    return set(alignment.values)


def test_page_functions(sections):
    assert sections["The functions"][0]["loss"].shape == ()


def test_page_any_model(sections):
    trained, saved, unet = sections["Any model"]
    assert trained["tokens"][KEY].grid == (16, 16) and trained["velocity"].shape == (2, 8, 32, 32)
    assert values_of(trained) == {"cosine", "gram_mse"}
    pretrained = DiTTransformer2DModel.from_pretrained("facebook/DiT-XL-2-256", subfolder="transformer").state_dict()
    after = DiTTransformer2DModel.from_pretrained("runs/dit/transformer").state_dict()
    assert set(after) == set(pretrained)
    assert not torch.equal(after["proj_out_2.weight"], pretrained["proj_out_2.weight"])
    assert [path.name for path in Path("runs/dit/projectors").iterdir()] == ["default"]
    assert unet["tokens"][KEY].grid == (4, 4) and unet["prediction"].shape == (2, 3, 32, 32)
    assert values_of(unet) == {"cosine", "gram_mse"}


def test_page_block_with_two_streams(sections):
    names = sections["What is read"][0]
    sd3, student, streams = names["sd3"], names["sd3_student"], []
    handle = sd3.transformer_blocks[7].register_forward_hook(lambda block, args, output: streams.extend(output))
    with torch.no_grad():
        _, tokens = student(
            names["sd3_x_t"],
            encoder_hidden_states=names["prompt_embeds"],
            pooled_projections=names["pooled_prompt_embeds"],
            timestep=1000 * names["t"],
        )
        handle.remove()
        text, image = (student.projectors["default"](stream) for stream in streams)
    torch.testing.assert_close(tokens[KEY].tokens, image)
    assert text.shape == image.shape and not torch.allclose(text, image)


def test_page_labels_are_dropped_once(sections):
    names = sections["Notes on DiT and U-Nets"][0]
    dit, null_class = names["dit"].train(), names["null_class"]
    assert null_class == 10
    with torch.no_grad():
        inputs = (names["x_t"], 1000 * names["t"])
        outputs = [dit(*inputs, class_labels=torch.tensor([1, null_class])).sample for _ in range(3)]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_page_terms(sections):
    full, without_projector = sections["Terms"]
    code = next(block.code for block in read_blocks("docs/alignment.md") if block.heading == "Terms")
    for field in dataclasses.fields(AlignmentTerm):
        assert field.name == "objective" or f"{field.name}=" in code
    assert full["criterion"].terms["cosine"].feature == KEY
    assert without_projector["tokens"][KEY].dim == 16 and values_of(without_projector) == {"gram_mse"}


def test_page_several_teachers(sections):
    names = sections["Several teachers, depths and projectors"][0]
    assert {key: token_map.dim for key, token_map in names["tokens"].items()} == {
        ("early", "dino"): 16,
        ("late", "clip"): 24,
    }
    assert values_of(names) == {"dino", "dino_gram", "clip"}


def test_page_schedules(sections):
    scheduled, ended = sections["Schedules, and an end"]
    criterion = scheduled["criterion"]
    assert criterion.stop_steps() == (80_000, 100_000)
    assert criterion.terms["gram_mse"].schedule(500) == pytest.approx(1.0, abs=1e-3)
    assert ended["ended"] == {KEY} and ended["tokens"] == {} and ended["features"] is None
    assert ended["alignment"].loss.item() == 0
    assert not any(parameter.requires_grad for parameter in ended["student"].projectors.parameters())


def test_page_self_alignment(sections):
    assert values_of(sections["Self-alignment"][0]) == {"layer_sync", "dispersive"}


def test_page_own_objective(sections):
    names = sections["An objective of your own"][0]
    student, target = (TokenMap(torch.randn(2, 4, 3), (2, 2)) for _ in range(2))
    expected = ((student.tokens - target.tokens) ** 2).sum(dim=(1, 2)) / 12
    torch.testing.assert_close(names["EuclideanAlignment"]()(student, target), expected)
    with pytest.raises(ValueError, match="equal width"):
        names["EuclideanAlignment"]()(student, TokenMap(torch.randn(2, 4, 5), (2, 2)))
    assert isinstance(names["criterion"].terms["euclidean"].objective, names["EuclideanAlignment"])


def test_page_precision(sections):
    names = sections["Precision, several processes, compilation"][0]
    assert names["accelerator"].mixed_precision == "bf16"
    assert names["tokens"][KEY].tokens.dtype == torch.float32
    assert values_of(names) == {"cosine", "gram_mse"}
    inner = names["accelerator"].unwrap_model(names["student"])
    # What DDP asks of every parameter.
    assert all(parameter.grad is not None for parameter in inner.parameters() if parameter.requires_grad)


def test_page_configuration(tmp_path: Path):
    (block,) = read_blocks("docs/alignment.md", "yaml")
    shutil.copy(ROOT / "examples/configs/base_imagenet_256.yaml", tmp_path)
    (tmp_path / "mine.yaml").write_text(block.code)
    config = load_training_config(["--config", str(tmp_path / "mine.yaml"), "--output_dir", str(tmp_path / "run")])
    terms = build_terms(config.alignment.terms)
    assert list(terms) == ["cosine", "gram_mse", "clip"]
    assert terms["gram_mse"].schedule == HardStop(100_000, 2.0) and terms["cosine"].schedule(0) == 1.0
    assert terms["clip"].feature == ("late", "clip") and terms["clip"].teacher == "clip"
    assert config.alignment.depth == 8 and config.teachers["clip"].grid is not None


def test_page_tables_name_every_objective_and_projector():
    text = (ROOT / "docs/alignment.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] == "| `"]
    objectives = {row[0].strip("`"): row for row in rows if len(row) == 6}
    assert list(objectives) == list(OBJECTIVES)
    for name, (_, class_name, _, scope, width, target) in objectives.items():
        objective = OBJECTIVES[name]
        assert class_name == f"`{objective.__name__}`" and scope == objective.scope
        assert (width == "equal") == objective.needs_equal_width and (target == "no") != objective.needs_target
        kind = objective.__module__.split(".")[-1]
        assert kind in ("pointwise", "gram", "relational", "cka", "batch") and (kind == "batch") == (scope == "batch")
    projectors = {row[0].strip("`"): row[1] for row in rows if len(row) == 3}
    assert list(projectors) == list(PROJECTORS)
    assert all(call.startswith(f"`{PROJECTORS[name].__name__}(") for name, call in projectors.items())


# README.md and docs/teachers.md


def readme_block(containing: str) -> Block:
    (block,) = [block for block in read_blocks("README.md") if containing in block.code]
    return block


def test_readme_pipeline():
    block = readme_block("SiTPipeline.from_pretrained")
    if not torch.cuda.is_available():
        block = block._replace(code=block.code.replace('"cuda"', '"cpu"'))
    names: dict[str, Any] = {}
    run("README.md", block, names)
    assert names["pipe"].transformer.dtype == torch.bfloat16
    assert names["image"].size == (16, 16)


def test_readme_losses_on_a_model_of_your_own():
    names = {
        "my_transformer": PlainTransformer(width=1152, num_blocks=8),
        "x_t": torch.randn(2, 4, 32, 32),
        "timestep": torch.tensor([0.2, 0.7]),
        "labels": torch.tensor([1, 2]),
        "images": torch.rand(2, 3, 256, 256),
        "step": 0,
    }
    run("README.md", readme_block("AlignedDenoiser("), names)
    assert names["velocity"].shape == (2, 4, 32, 32) and names["teacher"].input_size == (224, 224)
    assert values_of(names) == {"cosine", "gram_mse"} and names["alignment"].weights["gram_mse"] == 2.0
    names["alignment"].loss.backward()
    assert names["my_transformer"].embed.weight.grad.abs().sum() > 0


def test_readme_functions():
    student_tokens = torch.randn(2, 16, 6, requires_grad=True)
    names = {"student_tokens": student_tokens, "teacher_tokens": torch.randn(2, 16, 9)}
    run("README.md", readme_block("gram_mse_loss(student_tokens"), names)
    names["loss"].backward()
    assert student_tokens.grad.abs().sum() > 0


def test_readme_configuration(tmp_path: Path):
    (block,) = read_blocks("README.md", "yaml")
    (tmp_path / "my.yaml").write_text(block.code)
    config = load_training_config(["--config", str(tmp_path / "my.yaml")])
    assert config.model.preset == "SiT-B/2" and config.output_dir == "runs/mine" and config.optimizer.lr == 1e-4


def test_every_python_block_of_the_readme_is_run():
    markers = ("SiTPipeline.from_pretrained", "AlignedDenoiser(", "gram_mse_loss(student_tokens")
    assert len(read_blocks("README.md")) == len(markers) == len({readme_block(marker).line for marker in markers})


def test_teachers_page():
    load, row = read_blocks("docs/teachers.md")
    names: dict[str, Any] = {"images": torch.rand(2, 3, 256, 256)}
    run("docs/teachers.md", load, names)
    assert names["features"].grid == (16, 16) and names["features"].patch_tokens.shape == (2, 256, 16)
    assert names["features"].class_token.shape == (2, 16)
    row = row._replace(code=f"family = {row.code}")
    names = {name: getattr(families, name) for name in ("HALF", "TeacherFamily", "interpolating_inputs")}
    run("docs/teachers.md", row, names)
    assert names["family"].model_type == "my_model_type"


# docs/training.md


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with `photos/` and `my_run.yaml`, a run of tiny real parts."""
    write_assets(tmp_path)
    (tmp_path / "images").rename(tmp_path / "photos")
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    config["data"]["dataset"] = "photos"
    config["sampling"]["guidance_scale"] = 1.0
    (tmp_path / "my_run.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield tmp_path
    AcceleratorState._reset_state(reset_partial_state=True)


def training_block(heading: str) -> Block:
    (block,) = [block for block in read_blocks("docs/training.md") if block.heading == heading]
    return block


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_page_run_from_objects(run_folder: Path):
    config = yaml.safe_load((run_folder / "my_run.yaml").read_text())
    del config["data"]["dataset"]
    (run_folder / "my_run.yaml").write_text(yaml.safe_dump(config))
    names: dict[str, Any] = {}
    run("docs/training.md", training_block("A run from objects"), names)
    assert names["folder"] == Path("runs/objects") and len(names["trainer"].dataset) == len(names["images"]) == 24
    assert type(SiTPipeline.from_pretrained(names["folder"])) is SiTPipeline
    assert [record["step"] for record in metrics(names["folder"]) if record.get("checkpoint_mib", 0) > 0] == [3]
    stopping, calls = names["StopWhenGood"](), []
    names["trainer"].stop = calls.append
    for value in (0.06, 0.04):
        stopping.on_step_end(names["trainer"], 1, {"flow": torch.tensor(value)})
    assert calls == ["the flow loss is low enough"]


def test_page_method_of_your_own(run_folder: Path, monkeypatch: pytest.MonkeyPatch):
    config = yaml.safe_load((run_folder / "my_run.yaml").read_text())
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "patch_size": 2}
    monkeypatch.setitem(SIT_PRESETS, "SiT-S/2", sizes)
    kept = {name: config[name] for name in config.keys() - {"teacher", "alignment"}} | {"flow_weight": 0.5}
    (run_folder / "plain.yaml").write_text(yaml.safe_dump(kept | {"model": {"preset": "SiT-S/2"}}))
    run("docs/training.md", training_block("A method of your own"), {})
    records = metrics(Path("runs/plain"))
    for record in records:
        assert record["loss"] == pytest.approx(0.5 * record["flow"], rel=1e-5) and record["weight/flow"] == 0.5
    assert records[-1]["step"] == 4
    for folder in ("runs/plain", "runs/plain/checkpoint-4"):
        assert SiTPipeline.from_pretrained(folder)(0, num_inference_steps=2).images[0].size == (16, 16)


def test_page_transformer_of_your_own(run_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(presets, "_TRANSFORMERS", dict(presets._TRANSFORMERS))
    own: Any = ModuleType("my_models")
    own.MyTransformer = ToyTransformer
    monkeypatch.setitem(sys.modules, "my_models", own)
    block = training_block("A transformer of your own")
    tiny = block.code.replace("sample_size=32", "sample_size=8").replace("num_classes=1000", "num_classes=3")
    assert tiny != block.code
    run("docs/training.md", block._replace(code=tiny), {})
    assert type(SiTPipeline.from_pretrained("runs/mine").transformer) is ToyTransformer
    assert presets.find_preset("Toy-S/2")[0] is ToyTransformer


def test_every_python_block_of_the_training_page_is_run():
    # That of the presets runs in tests/configuration, with the page's YAML.
    headings = ["Presets", "A run from objects", "A method of your own", "A transformer of your own"]
    assert [block.heading for block in read_blocks("docs/training.md")] == headings


def test_page_names_of_other_scripts():
    text = (ROOT / "docs/training.md").read_text()
    pairs = re.findall(r"`--(\w+)`\s+with\s+`--([\w.]+)`", text)
    assert len(pairs) > 5
    for theirs, ours in pairs:
        with pytest.raises(ConfigurationError, match=f"there is no option --{theirs}: here it is --{ours}."):
            load_training_config([f"--{theirs}", "1"])


PAGES_WITH_LINKS = [page for page in PAGES if not page.startswith("model_cards/sit")]


@pytest.mark.parametrize("page", PAGES_WITH_LINKS)
def test_links_lead_somewhere(page: str):
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        if target.startswith("https://"):
            continue
        file, _, heading = target.partition("#")
        found = (ROOT / page).parent / file if file else ROOT / page
        assert found.exists(), target
        if heading:
            lines = [line for line in found.read_text().splitlines() if line.startswith("#")]
            known = {re.sub(r"[^a-z0-9 -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in lines}
            assert heading in known, target


@pytest.mark.parametrize("page", PAGES)
def test_modules_and_files_that_pages_name_exist(page: str):
    text = (ROOT / page).read_text()
    for name in set(re.findall(r"\bdiffusers_srepa((?:\.[a-z_0-9]+)+)", text)):
        path = ROOT / "src/diffusers_srepa" / name.strip(".").replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").exists(), name
    for name in set(re.findall(r"`((?:src|tests|examples|docs)/[\w./-]+)`", text)):
        assert (ROOT / name).exists(), name
    if page == "CONTRIBUTING.md":
        for name in set(re.findall(r"`([a-z_]+/[\w/]+\.py)`", text)):
            assert (ROOT / "src/diffusers_srepa" / name).exists() or (ROOT / name).exists(), name


def test_the_tree_of_the_contributing_page_is_complete():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    source = ROOT / "src/diffusers_srepa"
    levels = {
        name.strip("/").removesuffix(".py"): int(level) for name, level in re.findall(r"^  (\S+) +L(\d) ", text, re.M)
    }
    parts = {path.stem for path in source.iterdir() if path.name[0] != "_"}
    assert set(levels) == parts
    for part, level in levels.items():
        assert part in LEVELS[level], part


def test_every_test_that_the_reliability_page_names_exists() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|") and "`tests/" in line]
    assert len(rows) > 20
    for row in rows:
        file = ""
        for path, name in re.findall(r"`([\w/.]*)(?:::(\w+))?`", row.rpartition(" | ")[2]):
            file = path or file
            assert (ROOT / file).exists(), file
            if name:
                assert f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"
