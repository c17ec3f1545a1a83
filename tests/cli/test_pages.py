"""Every command that a page shows has only options that there are, with values that they take."""

import re
import shlex

import pytest

from diffusers_srepa.configuration.command_line import load_config, load_training_config
from tests.cli.test_main import CLASSES
from tests.helpers.launched_run import ROOT


PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
STARTS = {
    r"examples/train_srepa\.py": "train",
    **{rf"(?:^diffusers-srepa|-m diffusers_srepa\.cli) {name}": name for name in CLASSES},
}


def _commands(page: str) -> list[tuple[str, list[str]]]:
    """Name and words of each command in a page's shell blocks, files that only the reader has left out."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    found = []
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        for start, name in STARTS.items():
            if match := re.search(start, line.strip()):
                text = re.sub(r"--config (?!examples/)\S+( --variant \S+)?", "", line.strip()[match.end() :])
                found.append((name, shlex.split(text, comments=True)))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_the_pages(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name, words in _commands(page):
        if name == "train":
            load_training_config(words, validate=False)
        else:
            load_config(words, CLASSES[name])


def test_the_pages_show_every_command() -> None:
    shown = [name for page in PAGES for name, _ in _commands(page)]
    assert set(shown) == set(CLASSES) and len(shown) > 15


def test_the_launch_files_name_the_script() -> None:
    for path in sorted((ROOT / "examples/accelerate").iterdir()):
        assert "examples/train_srepa.py" in path.read_text(), path
