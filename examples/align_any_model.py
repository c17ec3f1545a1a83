"""Add sREPA to a diffusers model that this package did not write.

    python examples/align_any_model.py --model dit       # a DiTTransformer2DModel on latents, one of its blocks tapped
    python examples/align_any_model.py --model unet      # a UNet2DModel on pixels, its middle block tapped

Both train for about half a minute on two CPU cores, on the digits and with the autoencoder and the teacher of the
quickstart. The model itself is not changed: `AlignedDenoiser` reads the tapped module by a forward hook, and what is
saved in the end is an ordinary diffusers model, with the projector in a folder of its own. Under `accelerate launch`
the same script runs on several processes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import load_dataset
from diffusers import DiTTransformer2DModel, UNet2DModel
from torch.utils.data import DataLoader, TensorDataset

from diffusers_srepa import (
    AlignedDenoiser,
    AlignmentLoss,
    AutoencoderKLLatents,
    CosineAlignment,
    GramMSEAlignment,
    LinearInterpolant,
    MLPProjector,
    PixelLatents,
    Teacher,
)


ASSETS = Path(__file__).resolve().parent / "quickstart"
NUM_CLASSES = 10


def build_dit(latent_shape: tuple[int, int, int]) -> tuple[torch.nn.Module, str, int, tuple[int, int]]:
    """A small DiT for latents `(C, h, w)`: the model, the tap, the width of the tapped tokens and their grid."""
    channels, height, width = latent_shape
    model = DiTTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=32,
        in_channels=channels,
        out_channels=2 * channels,  # as in the released DiTs, which predict a variance too
        num_layers=4,
        sample_size=height,
        patch_size=2,
        num_embeds_ada_norm=NUM_CLASSES,
    )
    return model, "transformer_blocks.1", 3 * 32, (height // 2, width // 2)


def build_unet(image_shape: tuple[int, int, int]) -> tuple[torch.nn.Module, str, int, tuple[int, int]]:
    """The same for images `(C, H, W)`: a small U-Net that halves them three times before its middle block."""
    channels, height, width = image_shape
    model = UNet2DModel(
        sample_size=height,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16, 32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        num_class_embeds=NUM_CLASSES,
    )
    return model, "mid_block", 64, (height // 8, width // 8)


def load_digits() -> TensorDataset:
    """Images uint8 `(3, 32, 32)` and labels."""
    rows = load_dataset(str(ASSETS / "data"), split="train")
    images = np.stack([np.asarray(image.convert("RGB")) for image in rows["image"]])
    return TensorDataset(torch.from_numpy(images).permute(0, 3, 1, 2), torch.tensor(rows["label"]))


def train(args: argparse.Namespace) -> None:
    """Train by flow matching with alignment, and print how the raw losses fall."""
    accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=args.cpu)
    set_seed(args.seed, device_specific=True)
    device = accelerator.device
    latent_space = (
        AutoencoderKLLatents.from_pretrained(ASSETS / "vae").to(device) if args.model == "dit" else PixelLatents()
    )
    model, tap, width, grid = (build_dit if args.model == "dit" else build_unet)(latent_space.latent_shape(32, 32))

    # What sREPA adds: a teacher with the student's grid, a hook with a projector behind it, and two terms of the loss.
    teacher = Teacher.from_pretrained(str(ASSETS / "teacher"), grid=grid).to(device)
    student = AlignedDenoiser(model, tap=tap, projector=MLPProjector(width, teacher.feature_dim, hidden_dim=256))
    criterion = AlignmentLoss({"cosine": (CosineAlignment(), 1.0), "gram_mse": (GramMSEAlignment(), 2.0)})

    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, weight_decay=0.0)
    digits, batch_size = load_digits(), args.batch_size // accelerator.num_processes
    if not 1 <= batch_size <= len(digits) // accelerator.num_processes:
        raise SystemExit(
            f"--batch_size is {args.batch_size} on {accelerator.num_processes} process(es), but must be from "
            f"{accelerator.num_processes} to {len(digits)}, the number of digits."
        )
    loader = DataLoader(digits, batch_size, shuffle=True, drop_last=True)
    student, optimizer, loader = accelerator.prepare(student, optimizer, loader)
    batches = (batch for _ in range(args.steps) for batch in loader)
    path = LinearInterpolant()
    history: list[dict[str, float]] = []
    accelerator.print(f"{args.model}: tap {tap!r}, {grid[0]} x {grid[1]} tokens of width {width}, on {device}")

    for step in range(args.steps):
        images, labels = next(batches)
        images = images.float() / 255
        mean, std = latent_space.encode_moments(images)
        latents = latent_space.sample(mean, std, torch.randn_like(mean))
        noise, t = torch.randn_like(latents), torch.rand(len(latents), device=device)

        velocity, tokens = student(path.interpolate(latents, noise, t), 1000 * t, class_labels=labels)
        alignment = criterion(tokens, teacher(images), step=step)
        velocity = velocity[:, : latents.shape[1]]  # the channels of a variance, if any, are left alone
        flow = (velocity - path.velocity(latents, noise, t)).square().mean()

        accelerator.backward(flow + alignment.loss)
        accelerator.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append({name: value.item() for name, value in {"flow": flow, **alignment.values}.items()})
        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            means = [f"{name} {np.mean([values[name] for values in history]):+.4f}" for name in history[0]]
            accelerator.print(f"steps {step + 2 - len(history)} to {step + 1}: {', '.join(means)}")
            history.clear()

    if args.output_dir is not None and accelerator.is_main_process:
        inner = accelerator.unwrap_model(student)
        inner.transformer.save_pretrained(args.output_dir / args.model)
        inner.save_projectors(args.output_dir / "projectors")
        print(f"{type(model).__name__}.from_pretrained({str(args.output_dir / args.model)!r}) loads the model.")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, by default from the command line."""
    parser = argparse.ArgumentParser(description="Add sREPA to a model of diffusers, on handwritten digits.")
    parser.add_argument("--model", choices=["dit", "unet"], default="dit")
    parser.add_argument("--steps", type=int, default=120, help="optimiser steps")
    parser.add_argument("--batch_size", type=int, default=32, help="images per step, over all processes")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--log_every", type=int, default=20, help="steps that one line averages over")
    parser.add_argument("--output_dir", type=Path, help="where the model and the projector are written, if anywhere")
    parser.add_argument("--cpu", action="store_true", help="use the CPU although there is a GPU")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    train(parse_arguments())
