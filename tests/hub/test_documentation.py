"""The Python examples of docs/hub.md run, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from diffusers_srepa.alignment.projectors import MLPProjector
from diffusers_srepa.models.transformer_sit import SiTTransformer2DModel
from diffusers_srepa.pipelines.hub import SiTPipeline
from diffusers_srepa.schedulers.scheduling_flow_match_euler_maruyama import FlowMatchEulerMaruyamaScheduler
from tests.hub.conftest import REPOSITORY_ROOT
from tests.hub.protocol import User
from tests.hub.server import TOKEN, HubServer


def test_examples_of_the_hub_page(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.users[TOKEN] = User("me")
    monkeypatch.chdir(tmp_path)
    transformer = SiTTransformer2DModel(
        sample_size=4, in_channels=3, num_layers=1, num_attention_heads=1, attention_head_dim=8, num_classes=2
    )
    SiTPipeline(transformer, None, FlowMatchEulerMaruyamaScheduler()).save_pretrained("runs/xl")
    MLPProjector(8, 4, hidden_dim=8).save_pretrained("runs/xl/projectors/default")
    Path("runs/xl/README.md").write_text("---\nlicense: mit\n---\n# ours\n")

    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY_ROOT / "docs" / "hub.md").read_text(), re.DOTALL)
    assert len(blocks) == 6
    for block in blocks:
        namespace: dict[str, object] = {}
        exec(compile(block, "docs/hub.md", "exec"), namespace)

    repository = hub.model("me/sit-xl-2-srepa")
    assert repository.private and "refs/tags/v1" in repository.refs
    titles = [commit.title for commit in repository.history("main")]
    assert titles == ["Upload SiTPipeline", "400,000 steps", "initial commit"]
    assert b"# ours" in repository.resolve("main").files["README.md"].content
    assert Path("sample.png").is_file()
    loaded = namespace["transformer"]
    assert isinstance(loaded, SiTTransformer2DModel) and torch.equal(loaded.pos_embed, transformer.pos_embed)
