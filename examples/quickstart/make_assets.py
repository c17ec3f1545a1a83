"""Train the quickstart's two small networks on the training digits and store them beside this file.

    python examples/quickstart/make_assets.py                  # or: make quickstart-assets

writes `vae/` (an `AutoencoderKL`: 3 x 32 x 32 pixels to 4 x 8 x 8 latents) and `teacher/` (a `Dinov2Model` with
patches of 8 pixels, so 4 x 4 patch tokens, and its image processor), in the folders that `from_pretrained` reads.
They stand in for the VAE of Stable Diffusion and for DINOv2, at a size that a laptop trains in minutes. The held-out
digits are used for the measurements alone, which are printed and written to `measurements.json`.

The same library versions on the same kind of processor give the same weights.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from digits import CLASS_NAMES, IMAGE_SIZE, load_digit_split
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model


SEED = 0
BATCH_SIZE = 64
VAE_STEPS = 500
VAE_KL_WEIGHT = 1e-2
TEACHER_STEPS = 1000
MASKED_FRACTION = 0.4


# --- data ---


def load_images(split: str) -> tuple[Tensor, Tensor]:
    """Images as float `(N, 3, 32, 32)` in [0, 1] and labels `(N,)`."""
    images, labels = load_digit_split(split)
    grey = torch.from_numpy(images).float().div(255).unsqueeze(1)
    return grey.expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(labels)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate by up to 12 degrees, scale by 0.9 to 1.1 and shift by up to 1.6 pixels, each image differently."""
    angle, scale, shift_x, shift_y = (torch.rand(4, len(images), generator=generator) * 2 - 1) * torch.tensor(
        [[np.pi / 15], [0.1], [0.1], [0.1]]
    )
    scale = 1 + scale
    cos, sin = angle.cos() * scale, angle.sin() * scale
    matrices = torch.stack([cos, -sin, shift_x, sin, cos, shift_y], dim=1).float().reshape(-1, 2, 3)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def batches(images: Tensor, labels: Tensor, num_steps: int, generator: torch.Generator):
    """Yield `num_steps` augmented batches, drawn without replacement within each pass over the data."""
    order: Tensor = torch.empty(0, dtype=torch.long)
    for _ in range(num_steps):
        if len(order) < BATCH_SIZE:
            order = torch.randperm(len(images), generator=generator)
        chosen, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
        yield augment(images[chosen], generator), labels[chosen]


def one_cycle(parameters, learning_rate: float, num_steps: int, weight_decay: float = 0.0):
    """AdamW whose rate rises over a tenth of the steps and then falls to zero."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, num_steps, pct_start=0.1)


# --- autoencoder ---


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=IMAGE_SIZE,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )


def train_vae(images: Tensor, labels: Tensor, num_steps: int) -> AutoencoderKL:
    """Minimise L1 + MSE of the reconstruction + a little KL, then set `scaling_factor` to 1 / std of the latents."""
    generator = torch.Generator().manual_seed(SEED)
    vae = build_vae().train()
    optimizer, schedule = one_cycle(vae.parameters(), 3e-3, num_steps)
    for step, (batch, _) in enumerate(batches(images, labels, num_steps, generator)):
        batch = batch * 2 - 1
        posterior = vae.encode(batch).latent_dist
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        reconstruction = vae.decode(latents).sample
        kl = posterior.kl().mean() / latents[0].numel()
        loss = F.l1_loss(reconstruction, batch) + F.mse_loss(reconstruction, batch) + VAE_KL_WEIGHT * kl
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report_progress("autoencoder", step, num_steps, loss, kl)
    vae.eval()
    with torch.no_grad():
        latents = vae.encode(images * 2 - 1).latent_dist.sample(generator)
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
    return vae


@torch.no_grad()
def measure_vae(vae: AutoencoderKL, images: Tensor) -> dict[str, float]:
    posterior = vae.encode(images * 2 - 1).latent_dist
    reconstruction = vae.decode(posterior.mean).sample.clamp(-1, 1)
    error = F.mse_loss(reconstruction / 2, images - 0.5, reduction="none").mean(dim=(1, 2, 3))
    return {
        "psnr_db": float(-10 * error.log10().mean()),
        "psnr_db_worst": float(-10 * error.max().log10()),
        "latent_std": float(posterior.mean.std()),
        "posterior_std": float(posterior.std.mean()),
        "scaling_factor": vae.config.scaling_factor,
    }


# --- teacher ---


def build_teacher() -> Dinov2Model:
    config = Dinov2Config(
        image_size=IMAGE_SIZE,
        patch_size=8,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        mlp_ratio=2,
    )
    return Dinov2Model(config)


def normalisation(images: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of the training pixels; the digits are grey, so one number serves all channels."""
    return round(float(images.mean()), 4), round(float(images.std()), 4)


class TeacherObjective(nn.Module):
    """Classification from whole images and reconstruction of masked patches, both read off the final tokens.

    The classifier sees the class token and the mean patch token, so both carry what the digit is; the pixels of masked
    patches are regressed from their own tokens, so each patch token also carries its place and its neighbourhood.
    """

    def __init__(self, teacher: Dinov2Model) -> None:
        super().__init__()
        config = teacher.config
        self.teacher = teacher
        self.patch_size = config.patch_size
        self.classifier = nn.Linear(2 * config.hidden_size, len(CLASS_NAMES))
        self.decoder = nn.Linear(config.hidden_size, config.patch_size**2)

    def forward(self, pixels: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Normalised pixels `(B, 3, 32, 32)` to the classification loss and the reconstruction loss."""
        targets = F.unfold(pixels[:, :1], self.patch_size, stride=self.patch_size).transpose(1, 2)  # (B, N, patch^2)
        masked = torch.rand(targets.shape[:2], generator=generator) < MASKED_FRACTION
        masks = torch.cat([torch.zeros_like(masked), masked])
        tokens = self.teacher(pixels.repeat(2, 1, 1, 1), bool_masked_pos=masks).last_hidden_state
        whole, covered = tokens.chunk(2)
        logits = self.classifier(torch.cat([whole[:, 0], whole[:, 1:].mean(dim=1)], dim=1))
        classification = F.cross_entropy(logits, labels, label_smoothing=0.1)
        return classification, F.mse_loss(self.decoder(covered[:, 1:])[masked], targets[masked])


def train_teacher(images: Tensor, labels: Tensor, num_steps: int) -> Dinov2Model:
    generator = torch.Generator().manual_seed(SEED)
    mean, std = normalisation(images)
    objective = TeacherObjective(build_teacher()).train()
    optimizer, schedule = one_cycle(objective.parameters(), 2e-3, num_steps, weight_decay=0.05)
    for step, (batch, batch_labels) in enumerate(batches(images, labels, num_steps, generator)):
        classification, reconstruction = objective((batch - mean) / std, batch_labels, generator)
        optimizer.zero_grad()
        (classification + reconstruction).backward()
        nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report_progress("teacher", step, num_steps, classification, reconstruction)
    return objective.teacher.eval()


@torch.no_grad()
def measure_teacher(teacher: Dinov2Model, train: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor]):
    """Accuracy on held-out digits of logistic regressions on frozen features, and how alike the patch tokens are."""
    from sklearn.linear_model import LogisticRegression

    mean, std = normalisation(train[0])
    tokens = [teacher((images - mean) / std).last_hidden_state for images, _ in (train, held_out)]
    features = {
        "class_token": [part[:, 0] for part in tokens],
        "mean_patch_token": [part[:, 1:].mean(dim=1) for part in tokens],
        "pixels": [images[:, 0].flatten(1) for images, _ in (train, held_out)],
    }
    measured = {}
    for name, (fitted, tested) in features.items():
        probe = LogisticRegression(max_iter=1000).fit(fitted.numpy(), train[1].numpy())
        measured[f"linear_probe_{name}"] = float(probe.score(tested.numpy(), held_out[1].numpy()))
    patches = F.normalize(tokens[1][:, 1:], dim=-1)
    similarities = patches @ patches.transpose(1, 2)
    off_diagonal = similarities[:, ~torch.eye(similarities.shape[-1], dtype=torch.bool)]
    measured["patch_similarity_mean"] = float(off_diagonal.mean())
    measured["patch_similarity_std"] = float(off_diagonal.std())
    return measured


def save_teacher(teacher: Dinov2Model, folder: Path, mean: float, std: float) -> None:
    """Weights, config and the image processor's settings, in the words of `facebook/dinov2-base`."""
    teacher.save_pretrained(folder)
    size = teacher.config.image_size
    settings = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [mean] * 3,
        "image_std": [std] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


# --- the command ---


def report_progress(name: str, step: int, num_steps: int, *losses: Tensor) -> None:
    if (step + 1) % 100 == 0 or step + 1 == num_steps:
        print(f"{name} {step + 1}/{num_steps}: " + "  ".join(f"{float(loss.detach()):.4f}" for loss in losses))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the quickstart's autoencoder and teacher on the digits.")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent, help="default: beside this file")
    parser.add_argument("--vae_steps", type=int, default=VAE_STEPS)
    parser.add_argument("--teacher_steps", type=int, default=TEACHER_STEPS)
    options = parser.parse_args()

    # With one thread the order of every sum is fixed; on networks this small a second thread gains little.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    train, held_out = load_images("train"), load_images("test")
    started = time.perf_counter()

    torch.manual_seed(SEED)
    vae = train_vae(*train, options.vae_steps)
    vae.save_pretrained(options.output_dir / "vae")

    torch.manual_seed(SEED)
    teacher = train_teacher(*train, options.teacher_steps)
    save_teacher(teacher, options.output_dir / "teacher", *normalisation(train[0]))

    measured = {"vae": measure_vae(vae, held_out[0]), "teacher": measure_teacher(teacher, train, held_out)}
    text = json.dumps(measured, indent=2)
    (options.output_dir / "measurements.json").write_text(text + "\n")
    print(f"{text}\ndone in {time.perf_counter() - started:.0f} s; written to {options.output_dir}")


if __name__ == "__main__":
    main()
