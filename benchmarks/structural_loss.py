"""Time and memory of the structural losses: Algorithm 1 of the sREPA paper, written plainly, against this package.

Each row is one forward and backward pass of the structural term alone, from raw float32 tokens to the gradient of the
student's tokens. The contestants take turns within one process, so that a busy machine slows all of them alike; the
ratio is that of their median times. Memory is the peak of what is allocated during a pass beyond the two inputs, the
gradient included: on CPU from the events of PyTorch's allocator, on CUDA from its statistics.

    python benchmarks/structural_loss.py                        # the table of structural_loss.md
    python benchmarks/structural_loss.py --step SiT-B/2         # share of the term in a whole training step
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from diffusers_srepa.alignment.gram.losses import choose_mse_form, gram_kl_loss, gram_mse_loss
from diffusers_srepa.alignment.gram.triton_launch import obstacle
from diffusers_srepa.models.transformer_sit import SiTTransformer2DModel


Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Algorithm 1 holds up to about this many N x N float32 matrices at once.
MATRICES_OF_ALGORITHM_1 = 9


def algorithm_1(student: torch.Tensor, teacher: torch.Tensor, mode: str) -> torch.Tensor:
    """The structural part of the paper's Algorithm 1, line by line, with both temperatures 0.2."""
    z = F.normalize(teacher, dim=-1)
    z_til = F.normalize(student, dim=-1)
    a = torch.bmm(z, z.transpose(1, 2))
    a_til = torch.bmm(z_til, z_til.transpose(1, 2))
    mask = torch.eye(a.shape[1], device=a.device).bool()
    a = a[:, ~mask].reshape(a.shape[0], a.shape[1], a.shape[1] - 1)
    a_til = a_til[:, ~mask].reshape(a_til.shape[0], a_til.shape[1], a_til.shape[1] - 1)
    if mode == "mse":
        return F.mse_loss(a, a_til)
    probabilities = F.softmax(a.detach() / 0.2, dim=-1)
    return F.kl_div(F.log_softmax(a_til / 0.2, dim=-1), probabilities, reduction="batchmean")


def forward_backward(loss: Loss, student: torch.Tensor, teacher: torch.Tensor) -> None:
    """One pass, ended on the device too."""
    student.grad = None
    loss(student, teacher).mean().backward()
    if student.is_cuda:
        torch.cuda.synchronize()


def median_times(contestants: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each, run in turns after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(repeats + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if repeat > 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """Peak of the memory that `run` allocates beyond what is held before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - held
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = level = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def memory_suffices(num_tokens: int, device: torch.device) -> bool:
    """Whether Algorithm 1 fits at batch size 1."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return MATRICES_OF_ALGORITHM_1 * 4 * num_tokens**2 < 0.8 * free


def our_losses(student: torch.Tensor) -> list[tuple[str, str, Loss]]:
    """Mode, form and function of each row: the forms taken by default, and tiles without kernels beside those with."""
    _, num_tokens, dim = student.shape
    kl_forms = ["tiled"] if obstacle(student, torch.float32) else ["fused", "tiled"]
    losses: list[tuple[str, str, Loss]] = [("mse", choose_mse_form(num_tokens, dim, dim), gram_mse_loss)]
    return losses + [("kl", form, partial(gram_kl_loss, form=form)) for form in kl_forms]


def compare(num_tokens: int, arguments: argparse.Namespace) -> list[str]:
    """Rows of the table for one number of tokens."""
    device, dim = torch.device(arguments.device), arguments.dim
    batch = max(1, arguments.tokens_per_batch // num_tokens)
    generator = torch.Generator().manual_seed(0)
    student = (torch.randn(batch, num_tokens, dim, generator=generator) + 0.5).to(device).requires_grad_()
    teacher = (torch.randn(batch, num_tokens, dim, generator=generator) + 0.3).to(device)
    fits = memory_suffices(num_tokens, device)
    repeats = arguments.repeats if num_tokens < 10000 else 1
    rows = []
    for mode, form, ours in our_losses(student):
        losses: dict[str, Loss] = {"ours": ours}
        if fits:
            losses["paper"] = lambda s, t, mode=mode: algorithm_1(s, t, mode)
        runs = {name: lambda loss=loss: forward_backward(loss, student, teacher) for name, loss in losses.items()}
        times = median_times(runs, repeats)
        student.grad = None
        memory = {name: peak_bytes(run, device) / 1e6 for name, run in runs.items()}
        cells = [str(num_tokens), str(batch), mode.upper(), form, f"{1e3 * times['ours']:.0f} ms"]
        if fits:
            cells += [f"{1e3 * times['paper']:.0f} ms", f"**{times['paper'] / times['ours']:.2f}x**"]
            cells += [
                f"{memory['ours']:.1f} MB",
                f"{memory['paper']:.1f} MB",
                f"{memory['ours'] / memory['paper']:.3f}",
            ]
        else:
            cells += ["does not fit", "", f"{memory['ours']:.1f} MB", "", ""]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def share_of_a_step(name: str, arguments: argparse.Namespace) -> list[str]:
    """Time of the structural terms relative to forward and backward of the model, both at one batch of 256 tokens.

    On CUDA the model runs in bfloat16 autocast, as in training; on a CPU that would be slower than float32.
    """
    device, batch = torch.device(arguments.device), arguments.step_batch
    model = SiTTransformer2DModel.from_preset(name).to(device).train()
    latents, labels = torch.randn(batch, 4, 32, 32, device=device), torch.zeros(batch, dtype=torch.long, device=device)
    timestep = torch.full((batch,), 500.0, device=device)
    student = torch.randn(batch, 256, arguments.dim, device=device, requires_grad=True)
    teacher = torch.randn(batch, 256, arguments.dim, device=device)

    def step() -> None:
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            velocity = model(latents, timestep, labels).sample
        velocity.float().square().mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    runs: dict[str, Callable[[], None]] = {"step": step}
    losses: dict[str, Loss] = {"MSE": gram_mse_loss, "KL": gram_kl_loss}
    losses["Algorithm 1 MSE"] = lambda s, t: algorithm_1(s, t, "mse")
    for label, loss in losses.items():
        runs[label] = lambda loss=loss: forward_backward(loss, student, teacher)
    times = median_times(runs, arguments.repeats)
    return [f"| {name} | {label} | {100 * times[label] / times['step']:.2f} % |" for label in losses]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-tokens", type=int, nargs="*", default=[256, 1024, 4096, 16384])
    parser.add_argument("--dim", type=int, default=768, help="width of student and teacher tokens")
    parser.add_argument("--tokens-per-batch", type=int, default=4096, help="batch size times number of tokens")
    parser.add_argument("--repeats", type=int, default=9, help="timed passes of each contestant")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; PyTorch's default if left out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--step", nargs="*", default=[], help="SiT presets whose training step to compare with")
    parser.add_argument("--step-batch", type=int, default=2, help="images per step with --step; 32 or more on a GPU")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    machine = torch.cuda.get_device_name() if arguments.device != "cpu" else platform.machine()
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, D = {arguments.dim}\n")
    if arguments.step:
        print("| model | structural term | share of the step |\n|---|---|---|")
        for name in arguments.step:
            print("\n".join(share_of_a_step(name, arguments)), flush=True)
        return
    print("| N | batch | loss | form | ours | Algorithm 1 | faster | memory, ours | memory, Algorithm 1 | ratio |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for num_tokens in arguments.num_tokens:
        print("\n".join(compare(num_tokens, arguments)), flush=True)


if __name__ == "__main__":
    main()
