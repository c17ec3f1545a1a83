"""Every wrong argument ends in a `ValueError` of one sentence before anything is computed."""

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from diffusers_srepa.pipelines.hub import SiTPipeline
from diffusers_srepa.schedulers.scheduling_flow_match_euler_maruyama import FlowMatchEulerMaruyamaScheduler
from tests.helpers.tiny_autoencoder import tiny_autoencoder
from tests.helpers.tiny_pipeline import generators, tiny_pipeline
from tests.helpers.tiny_sit import tiny_sit


@pytest.fixture(scope="module")
def pipe() -> SiTPipeline:
    return tiny_pipeline()


def assert_refused(pipe: SiTPipeline, words: list[str], **arguments: Any) -> None:
    calls = []
    hook = pipe.transformer.register_forward_pre_hook(lambda module, args: calls.append(1))
    with pytest.raises(ValueError) as error:
        pipe(**{"class_labels": [1, 2], "num_inference_steps": 2, **arguments})
    hook.remove()
    message = str(error.value)
    assert not calls and all(word in message for word in words), message
    assert "\n" not in message and message.endswith(".") and ". " not in message, message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"height": 18}, ["`height` is 18", "divisible by 4"]),
        ({"width": 10}, ["`width` is 10", "divisible by 4"]),
        ({"height": 0}, ["`height` is 0"]),
        ({"width": -16}, ["`width` is -16"]),
        ({"height": 16.0}, ["`height` is 16.0"]),
        ({"num_images_per_prompt": 0}, ["`num_images_per_prompt` is 0"]),
        ({"num_images_per_prompt": None}, ["`num_images_per_prompt` is None"]),
        ({"num_inference_steps": 0}, ["`num_inference_steps` is 0"]),
        ({"num_inference_steps": 1}, ["`num_inference_steps` is 1", "at least 2"]),
        ({"num_inference_steps": 2.5}, ["`num_inference_steps` is 2.5"]),
        ({"sigmas": [1.0, 0.5]}, ["`sigmas`", "FlowMatchEulerMaruyamaScheduler has a grid of its own"]),
        ({"sigmas": [0.5, 1.0]}, ["`sigmas` must be a list of decreasing numbers"]),
        ({"sigmas": [1.0, 0.0]}, ["`sigmas` must be a list of decreasing numbers"]),
        ({"sigmas": []}, ["`sigmas` must be a list of decreasing numbers"]),
        ({"guidance_scale": -1.0}, ["`guidance_scale` is -1.0"]),
        ({"guidance_scale": float("nan")}, ["`guidance_scale` is nan"]),
        ({"guidance_scale": "2"}, ["`guidance_scale` is '2'"]),
        ({"guidance_interval": (0.7, 0.2)}, ["`guidance_interval` is (0.7, 0.2)", "low <= high"]),
        ({"guidance_interval": (0.0, 1.5)}, ["`guidance_interval` is (0.0, 1.5)"]),
        ({"guidance_interval": (0, 700)}, ["`guidance_interval` is (0, 700)"]),
        ({"guidance_interval": 0.7}, ["`guidance_interval` is 0.7"]),
        ({"guidance_interval": (0.1, 0.2, 0.3)}, ["two times (low, high)"]),
        ({"guidance_channels": 5}, ["`guidance_channels` is 5", "4 channels"]),
        ({"guidance_channels": 0}, ["`guidance_channels` is 0"]),
        ({"class_token_guidance_scale": 2.0}, ["`class_token_guidance_scale` is 2.0", "no class token"]),
        ({"class_token_guidance_scale": -2.0}, ["`class_token_guidance_scale` is -2.0"]),
        ({"generator": 0}, ["`generator` is 0", "`torch.Generator`"]),
        ({"generator": [0, 1]}, ["`generator` is [0, 1]"]),
        ({"generator": []}, ["`generator` is a list of 0"]),
        ({"generator": generators(0)}, ["`generator` is a list of 1", "makes 2 images"]),
        ({"generator": generators(0, 1), "num_images_per_prompt": 2}, ["list of 2", "makes 4 images"]),
        ({"latents": torch.zeros(1, 4, 8, 8)}, ["`latents` has shape (1, 4, 8, 8)", "(2, 4, 8, 8)"]),
        ({"latents": torch.zeros(2, 3, 8, 8)}, ["`latents` has shape (2, 3, 8, 8)"]),
        ({"latents": torch.zeros(2, 4, 8, 8), "height": 32}, ["(2, 4, 16, 8)"]),
        ({"latents": torch.zeros(2, 4, 7, 8)}, ["`height` is 14", "divisible by 4"]),
        ({"latents": torch.zeros(2, 256)}, ["`latents` has shape (2, 256)"]),
        ({"latents": torch.zeros(2, 4, 8, 8, dtype=torch.long)}, ["`latents` must be a floating point tensor"]),
        ({"latents": [0.0]}, ["`latents` must be a floating point tensor"]),
        ({"output_type": "numpy"}, ["`output_type` is 'numpy'", "pil, np, pt, latent"]),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, ["'prompt_embeds'", "'latents'"]),
        ({"callback_on_step_end": 3}, ["`callback_on_step_end` is 3"]),
    ],
    # Neither objects nor their addresses: every test process must give the same names.
    ids=lambda value: "" if isinstance(value, dict) else value[0],
)
def test_wrong_arguments(pipe: SiTPipeline, arguments: dict[str, Any], words: list[str]) -> None:
    assert_refused(pipe, words, **arguments)


@pytest.mark.parametrize(
    ("components", "arguments", "words"),
    [
        (
            {"transformer": lambda: tiny_sit(class_dropout_prob=0.0)},
            {"guidance_scale": 2.0},
            ["null class", "`guidance_scale` to 1"],
        ),
        (
            {"vae": lambda: tiny_autoencoder(latent_channels=8)},
            {},
            ["autoencoder has 8 latent channels", "transformer has 4"],
        ),
        ({"transformer": lambda: tiny_sit(out_channels=8)}, {}, ["8 output channels", "`out_channels`"]),
        ({"vae": lambda: None}, {}, ["4 channels have no PIL form", "`output_type`"]),
        ({"scheduler": DDIMScheduler}, {}, ["DDIMScheduler is not set up for flow prediction"]),
        ({"scheduler": EulerDiscreteScheduler}, {}, ["EulerDiscreteScheduler is not set up for flow prediction"]),
        ({"scheduler": UniPCMultistepScheduler}, {}, ["UniPCMultistepScheduler", "use_flow_sigmas=True"]),
        (
            {"scheduler": lambda: UniPCMultistepScheduler(prediction_type="flow_prediction")},
            {},
            ["UniPCMultistepScheduler", "use_flow_sigmas=True"],
        ),
        (
            {"scheduler": lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)},
            {},
            ["`use_dynamic_shifting`"],
        ),
        (
            {"scheduler": lambda: FlowMatchEulerMaruyamaScheduler(num_train_timesteps=500)},
            {},
            ["`num_train_timesteps` is 500", "by 1000.0"],
        ),
        ({"scheduler": FlowMatchHeunDiscreteScheduler}, {"sigmas": [1.0, 0.5]}, ["has a grid of its own"]),
        ({"guidance_channels": lambda: 7}, {"guidance_scale": 2.0}, ["`guidance_channels` is 7"]),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_components_that_do_not_fit(components: dict[str, Any], arguments: dict[str, Any], words: list[str]) -> None:
    pipe = tiny_pipeline(**{name: build() for name, build in components.items()})
    assert_refused(pipe, words, **arguments)
