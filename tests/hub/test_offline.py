"""What was loaded once loads again in a new process without a network, and asks the Hub nothing."""

from __future__ import annotations

from datasets import Dataset, load_dataset
from transformers import AutoModel, Dinov2Config, Dinov2Model

from diffusers_srepa.models.transformer_sit import SiTTransformer2DModel
from diffusers_srepa.pipelines.hub import SiTPipeline
from diffusers_srepa.schedulers.scheduling_flow_match_euler_maruyama import FlowMatchEulerMaruyamaScheduler
from tests.hub.conftest import RunPython
from tests.hub.server import HubServer


OFFLINE = """
import datasets, torch, transformers
from diffusers_srepa import SiTPipeline

pipe = SiTPipeline.from_pretrained("tester/tiny-sit")
pipe.set_progress_bar_config(disable=True)
image = pipe(["one"], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
assert image.shape == (1, 3, 4, 4)
assert transformers.AutoModel.from_pretrained("tester/tiny-dino").config.hidden_size == 16
assert datasets.load_dataset("tester/numbers", split="train")["value"][:] == [1, 2, 3]
try:
    SiTPipeline.from_pretrained("tester/never-loaded")
except OSError as error:
    assert "tester/never-loaded" in str(error), error
else:
    raise SystemExit("loaded what is not there")
"""


def test_everything_loads_offline(hub: HubServer, run_python: RunPython) -> None:
    transformer = SiTTransformer2DModel(
        sample_size=4, in_channels=3, num_layers=1, num_attention_heads=1, attention_head_dim=8, num_classes=2
    )
    labels = {"0": "zero", "1": "one"}
    pipe = SiTPipeline(transformer, None, FlowMatchEulerMaruyamaScheduler(), id2label=labels)
    pipe.push_to_hub("tester/tiny-sit")
    # Files that the pipeline does not need are in the repository, but not in the cache.
    hub.model("tester/tiny-sit").add_files({"projectors/default/config.json": "{}", "config.yaml": "seed: 0"})
    Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).push_to_hub(
        "tester/tiny-dino"
    )
    Dataset.from_dict({"value": [1, 2, 3]}).push_to_hub("tester/numbers")

    SiTPipeline.from_pretrained("tester/tiny-sit")
    AutoModel.from_pretrained("tester/tiny-dino")
    load_dataset("tester/numbers", split="train")
    hub.log.clear()
    result = run_python(OFFLINE, HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    assert hub.log == []
