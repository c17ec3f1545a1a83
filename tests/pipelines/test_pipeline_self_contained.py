"""The file that repositories carry: it works with diffusers alone, and the public class is a subclass of its class."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import diffusers_srepa
from diffusers_srepa.models import transformer_sit
from diffusers_srepa.pipelines import pipeline_sit
from diffusers_srepa.pipelines.hub import SiTPipeline
from diffusers_srepa.schedulers import scheduling_flow_match_euler_maruyama
from tests.helpers.tiny_pipeline import tiny_pipeline


SCRIPT = """
import sys
sys.modules["diffusers_srepa"] = None
import torch
from pipeline_sit import SiTPipeline
from scheduling_flow_match_euler_maruyama import FlowMatchEulerMaruyamaScheduler
from transformer_sit import SiTTransformer2DModel

transformer = SiTTransformer2DModel(
    sample_size=4, in_channels=3, num_layers=1, num_attention_heads=2, attention_head_dim=8, num_classes=3
)
torch.nn.init.normal_(transformer.proj_out.weight)
pipe = SiTPipeline(transformer, None, FlowMatchEulerMaruyamaScheduler(), id2label={"0": "cat"})
pipe.save_pretrained("saved")
images = []
for each in (pipe, SiTPipeline.from_pretrained("saved"), SiTPipeline.from_pipe(pipe)):
    each.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images.append(each("cat", num_inference_steps=2, guidance_scale=2.0, generator=generator, output_type="pt").images)
assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
print("ok")
"""


@pytest.mark.slow
def test_with_diffusers_alone(tmp_path: Path) -> None:
    for module in (pipeline_sit, transformer_sit, scheduling_flow_match_euler_maruyama):
        shutil.copy(str(module.__file__), tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT)
    result = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.strip() == "ok", result.stderr


def test_the_two_classes(tmp_path: Path) -> None:
    """A folder does not tell which of the two has written it; both load it, as the class that was asked."""
    assert diffusers_srepa.SiTPipeline is SiTPipeline and issubclass(SiTPipeline, pipeline_sit.SiTPipeline)
    public = tiny_pipeline()
    plain = pipeline_sit.SiTPipeline(**public.components, **public.parameters)
    indices = []
    for pipe, folder in ((public, tmp_path / "public"), (plain, tmp_path / "plain")):
        pipe.save_pretrained(folder)
        indices.append(json.loads((folder / "model_index.json").read_text()))
        for cls in (SiTPipeline, pipeline_sit.SiTPipeline):
            loaded = cls.from_pretrained(folder)
            assert type(loaded) is cls and loaded.config.id2label == public.config.id2label
    assert indices[0] == indices[1] and indices[0]["_class_name"] == "SiTPipeline"


def test_from_one_class_to_the_other() -> None:
    public = tiny_pipeline(guidance_channels=3)
    plain = pipeline_sit.SiTPipeline.from_pipe(public)
    again = SiTPipeline.from_pipe(plain)
    assert type(plain) is pipeline_sit.SiTPipeline and type(again) is SiTPipeline
    assert again.transformer is public.transformer and again.config.guidance_channels == 3


def test_pickle_and_help() -> None:
    pipe = pickle.loads(pickle.dumps(tiny_pipeline()))
    assert type(pipe) is SiTPipeline
    generator = torch.Generator().manual_seed(0)
    assert pipe(1, num_inference_steps=2, generator=generator, output_type="pt").images.shape == (1, 3, 16, 16)
    assert "guidance_channels" in str(SiTPipeline.__doc__)
    assert "from diffusers_srepa import SiTPipeline" in str(SiTPipeline.__call__.__doc__)
