"""What users put alignment together from is imported from the package itself."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import diffusers_srepa
from diffusers_srepa.alignment.registry import OBJECTIVES, PROJECTORS, SCHEDULES, TARGET_TRANSFORMS


@pytest.mark.parametrize("registry", [OBJECTIVES, PROJECTORS, SCHEDULES, TARGET_TRANSFORMS])
def test_every_class_that_a_configuration_can_name_is_public(registry):
    for found in registry.values():
        assert found.__name__ in diffusers_srepa.__all__
        assert getattr(diffusers_srepa, found.__name__) is found


@pytest.mark.parametrize(
    "name",
    "AlignedDenoiser AlignmentLoss AlignmentObjective AlignmentOutput AlignmentTerm FeatureTap Schedule Tap Teacher "
    "TeacherFeatures TokenMap gram_kl_loss gram_mse_loss".split(),
)
def test_what_holds_them_together_is_public(name):
    assert name in diffusers_srepa.__all__ and getattr(diffusers_srepa, name).__name__ == name


def test_the_page_about_alignment_lists_every_schedule_with_its_arguments():
    page = (Path(__file__).resolve().parents[2] / "docs" / "alignment.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:3] == "| `"]
    written = {row[0].strip("`"): row[1] for row in rows if len(row) == 4}
    assert list(written) == list(SCHEDULES)
    for name, call in written.items():
        arguments = ", ".join(
            str(value).split(":")[0] for value in inspect.signature(SCHEDULES[name]).parameters.values()
        )
        bare = re.sub(r"=[\d.]+", "", call)
        assert bare.startswith(f"`{SCHEDULES[name].__name__}({arguments})`"), name


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(diffusers_srepa.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    imported = {
        alias.asname: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert set(imported) == set(diffusers_srepa.__all__) - {"__version__"}
    for name, module in imported.items():
        assert getattr(diffusers_srepa, name).__module__ == module
