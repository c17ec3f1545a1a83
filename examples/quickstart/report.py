"""What a finished quickstart run has learnt, as pictures and as one number.

    python examples/quickstart/report.py --run_dir runs/quickstart

loads the pipeline that training wrote, and writes into `<run_dir>/report`

    samples.png          ten samples of every class
    loss_curves.png      the losses over the training steps
    similarity_maps.png  which patches of a held-out digit resemble each other, for the teacher and for the student

Then a support vector machine, trained on the real training digits alone, reads the held-out real digits and the
samples. If it recognises fewer than 90 % of the samples, the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from digits import read_digits
from PIL import Image
from sklearn.svm import SVC

from diffusers_srepa import (
    AlignedDenoiser,
    AutoencoderKLLatents,
    SiTPipeline,
    Teacher,
    TokenMap,
    parse_training_config,
)
from diffusers_srepa.alignment.presets import default_depth
from diffusers_srepa.alignment.registry import load_projector
from diffusers_srepa.alignment.term import DEFAULT
from diffusers_srepa.configuration.training import TrainingConfig
from diffusers_srepa.interpolant import get_interpolant
from diffusers_srepa.visualization.figures import (
    plot_loss_curves,
    plot_similarity_maps,
    save_image_grid,
    similarity_maps,
)


ROOT = Path(__file__).resolve().parents[2]
SAMPLES_PER_CLASS = 10
WANTED_ACCURACY = 0.9
NOISE_LEVEL = 0.25  # the time t of the similarity maps: 0 is the image, 1 is noise
HELD_OUT_INDEX = 8


# --- samples ---


def sample_classes(pipeline: SiTPipeline, config: TrainingConfig) -> tuple[list[Image.Image], list[int]]:
    """Ten images of every class with fixed seeds: image i comes from seed i alone. All images of a class in a row."""
    num_classes = pipeline.transformer.config.num_classes
    labels = [label for label in range(num_classes) for _ in range(SAMPLES_PER_CLASS)]
    images: list[Image.Image] = []
    pipeline.set_progress_bar_config(desc="sampling", leave=False)
    for start in range(0, len(labels), 50):
        chosen = labels[start : start + 50]
        output = pipeline(
            class_labels=chosen,
            num_inference_steps=config.sampling.num_inference_steps,
            guidance_scale=config.sampling.guidance_scale,
            generator=[torch.Generator().manual_seed(start + index) for index in range(len(chosen))],
        )
        images += output.images
    return images, labels


# --- the independent judge ---


def classifier_features(images: Sequence[Image.Image] | np.ndarray) -> np.ndarray:
    """RGB images as grey vectors of 16 x 16 values in [0, 1]."""
    pictures = [image if isinstance(image, Image.Image) else Image.fromarray(image) for image in images]
    small = [np.asarray(picture.convert("L").resize((16, 16), Image.Resampling.BOX)) for picture in pictures]
    return np.stack(small).reshape(len(small), -1) / 255


def train_classifier(images: np.ndarray, labels: np.ndarray) -> SVC:
    """A support vector machine on real training digits; it has seen neither teacher, autoencoder nor samples."""
    return SVC(C=10.0).fit(classifier_features(images), labels)


# --- similarity maps ---


def build_student(run_dir: Path, pipeline: SiTPipeline, config: TrainingConfig) -> AlignedDenoiser:
    """The trained transformer with the tap of training, giving tokens after and before the trained projector."""
    folder = run_dir / "projectors" / "default"
    sizes = pipeline.transformer.config
    width = sizes.num_attention_heads * sizes.attention_head_dim
    depth = config.alignment.depth or default_depth(sizes.num_layers, width)
    return AlignedDenoiser(
        pipeline.transformer,
        tap=config.alignment.tap or f"transformer_blocks.{depth - 1}",
        projector=load_projector(folder) if folder.is_dir() else None,
        features=[(DEFAULT, DEFAULT), (DEFAULT, None)],
    )


@torch.no_grad()
def compare_tokens(
    run_dir: Path, pipeline: SiTPipeline, config: TrainingConfig, image: torch.Tensor, label: int
) -> dict[str, TokenMap]:
    """Tokens of the teacher on an image `(3, H, W)`, and of the student on the same image with noise."""
    latent_space = AutoencoderKLLatents(pipeline.vae)
    mean, std = latent_space.encode_moments(image.unsqueeze(0))
    latents = latent_space.sample(mean, std, torch.zeros_like(mean))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    noisy = get_interpolant(config.flow.path).interpolate(latents, noise, torch.tensor(NOISE_LEVEL))
    transformer = pipeline.transformer.eval()
    timestep = torch.tensor([NOISE_LEVEL * transformer.config.timestep_scale])
    student = build_student(run_dir, pipeline, config)
    _, tokens = student(noisy, timestep, class_labels=torch.tensor([label]))
    student.remove_taps()
    projected, hidden = tokens[DEFAULT, DEFAULT], tokens[DEFAULT, None]
    teacher = Teacher.from_pretrained(str(find_path(config.teacher.name_or_path)), grid=hidden.grid)
    return {
        "teacher": teacher(image.unsqueeze(0)).token_map(),
        "student, after the projector": projected,
        "student, before it": hidden,
    }


def pick_anchors(image: torch.Tensor, grid: tuple[int, int]) -> list[tuple[int, int]]:
    """The patches with the most and with the least ink of an image `(3, H, W)`, as (row, column)."""
    ink = torch.nn.functional.adaptive_avg_pool2d(image.mean(dim=0, keepdim=True), grid).flatten()
    return [divmod(int(index), grid[1]) for index in (ink.argmax(), ink.argmin())]


def draw_similarity_maps(
    run_dir: Path, pipeline: SiTPipeline, config: TrainingConfig, image: np.ndarray, label: int, out_png: Path
) -> Path:
    """Similarity maps of one uint8 image `(H, W, 3)` for its brightest and its darkest patch."""
    pixels = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    tokens = compare_tokens(run_dir, pipeline, config, pixels, label)
    anchors = pick_anchors(pixels, tokens["teacher"].grid)
    maps = {name: similarity_maps(token_map.without_prefix(), anchors)[0] for name, token_map in tokens.items()}
    title = f"How alike are the patches of this held-out digit? (student at noise level t = {NOISE_LEVEL})"
    return plot_similarity_maps(pixels, maps, anchors, out_png, title=title)


# --- the command ---


def find_path(path: str | Path) -> Path:
    """A path of the configuration: as it stands, or relative to the repository if it does not exist."""
    return Path(path) if Path(path).exists() else ROOT / path


def report(run_dir: str | Path, data_dir: str | Path | None = None, output_dir: str | Path | None = None) -> int:
    """Write the pictures, print the accuracies and what to do next.

    Args:
        run_dir: output folder of the finished training.
        data_dir: the digits, by default those that the run was trained on.
        output_dir: where the pictures go, by default `<run_dir>/report`.

    Returns:
        The exit code: 0, or 1 if the samples are not recognised often enough.
    """
    run_dir = Path(run_dir)
    output_dir = Path(output_dir or run_dir / "report")
    config = parse_training_config(["--config", str(run_dir / "config.yaml")])
    data_dir = find_path(data_dir or str(config.data.dataset))
    train_images, train_labels = read_digits(data_dir, "train")
    test_images, test_labels = read_digits(data_dir, "test")

    pipeline = SiTPipeline.from_pretrained(run_dir)
    samples, sample_labels = sample_classes(pipeline, config)
    names = [pipeline.config.id2label[str(label)] for label in sorted(set(sample_labels))]
    classifier = train_classifier(train_images, train_labels)
    on_real = float(classifier.score(classifier_features(test_images), test_labels))
    on_samples = float(classifier.score(classifier_features(samples), sample_labels))

    pictures = [
        save_image_grid(samples, output_dir / "samples.png", columns=SAMPLES_PER_CLASS, row_labels=names),
        plot_loss_curves(run_dir / "metrics.jsonl", output_dir / "loss_curves.png"),
        draw_similarity_maps(
            run_dir,
            pipeline,
            config,
            test_images[HELD_OUT_INDEX],
            int(test_labels[HELD_OUT_INDEX]),
            output_dir / "similarity_maps.png",
        ),
    ]
    print_findings(run_dir, config, pictures, on_real, on_samples)
    if on_samples < WANTED_ACCURACY:
        print(
            f"error: the classifier recognises {on_samples:.1%} of the samples, but at least {WANTED_ACCURACY:.0%} "
            "are expected: train longer (training.max_steps) or look at loss_curves.png.",
            file=sys.stderr,
        )
        return 1
    return 0


def print_findings(
    run_dir: Path, config: TrainingConfig, pictures: Sequence[Path], on_real: float, on_samples: float
) -> None:
    samples, curves, maps = pictures
    guidance, num_steps = config.sampling.guidance_scale, config.sampling.num_inference_steps
    print(f"""
A classifier that was trained on real digits alone recognises
    {on_real:6.1%} of the held-out real digits
    {on_samples:6.1%} of the samples

Look at
    {samples}  (a row per class)
    {curves}
    {maps}  (teacher and student)

Load the model and sample:
    from diffusers_srepa import SiTPipeline
    pipe = SiTPipeline.from_pretrained("{run_dir}")
    images = pipe(class_labels=["seven"], guidance_scale={guidance}, num_inference_steps={num_steps}).images
    images[0].save("seven.png")

Train another method, or longer:
    python examples/train_srepa.py --config examples/configs/quickstart.yaml \\
        --output_dir runs/quickstart-repa --alignment.preset repa --training.max_steps 600
""")


def main() -> int:
    parser = argparse.ArgumentParser(description="Look at what a quickstart run has learnt.")
    parser.add_argument("--run_dir", default="runs/quickstart", help="output folder of the training")
    parser.add_argument("--data_dir", help="the digits; by default those that the run was trained on")
    parser.add_argument("--output_dir", help="where the pictures go; by default <run_dir>/report")
    options = parser.parse_args()
    return report(options.run_dir, options.data_dir, options.output_dir)


if __name__ == "__main__":
    sys.exit(main())
