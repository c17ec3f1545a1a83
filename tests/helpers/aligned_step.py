"""One aligned training step on a transformer of someone else, light enough to import in spawned processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from diffusers_srepa.alignment.aligned_denoiser import AlignedDenoiser
from diffusers_srepa.alignment.loss import AlignmentLoss
from diffusers_srepa.alignment.objectives.pointwise import CosineAlignment
from diffusers_srepa.alignment.objectives.relational import GramMSEAlignment
from diffusers_srepa.alignment.projectors import MLPProjector
from diffusers_srepa.tokens import TeacherFeatures


class PlainTransformer(nn.Module):
    """A model of someone else: no configuration, blocks that return tuples, the velocity as a tensor."""

    def __init__(self, width: int = 8, num_blocks: int = 2, patch: int = 2, num_registers: int = 0) -> None:
        super().__init__()
        self.patch, self.num_registers = patch, num_registers
        self.embed = nn.Conv2d(4, width, patch, patch)
        self.blocks = nn.ModuleList([PlainBlock(width) for _ in range(num_blocks)])
        self.head = nn.ConvTranspose2d(width, 4, patch, patch)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens[:, : self.num_registers], tokens], dim=1)
        for block in self.blocks:
            tokens, _ = block(tokens)
        tokens = tokens[:, self.num_registers :]
        return self.head(tokens.transpose(1, 2).unflatten(2, x.shape[2:]))


class PlainBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4), nn.Linear(4, width)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return x + self.down(torch.tanh(self.up(x))), None


def plain_student() -> AlignedDenoiser:
    """The transformer above with an MLP projector behind its first block, in float64."""
    return AlignedDenoiser(PlainTransformer(), "blocks.0", MLPProjector(8, 12, hidden_dim=6)).double()


def plain_inputs(
    batch_size: int = 2, size: tuple[int, int] = (8, 8), dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, ...]:
    """Arguments of one forward of `PlainTransformer`."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch_size, 4, *size, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.linspace(0.1, 0.9, batch_size), torch.arange(batch_size)


def features(batch_size: int = 2, dtype: torch.dtype = torch.float32) -> TeacherFeatures:
    """Teacher features of width 12 on a 4 x 4 grid."""
    generator = torch.Generator().manual_seed(2)
    return TeacherFeatures(torch.randn(batch_size, 16, 12, generator=generator, dtype=torch.float64).to(dtype), (4, 4))


def total_loss(output: tuple[Any, ...], target: TeacherFeatures) -> torch.Tensor:
    """A velocity loss and both kinds of alignment, of what an `AlignedDenoiser` returns."""
    velocity, tokens = output
    criterion = AlignmentLoss({"cosine": (CosineAlignment(), 1.0), "gram_mse": (GramMSEAlignment(), 2.0)})
    return velocity.square().mean() + criterion(tokens, target).loss


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients that are there, by parameter name."""
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def train_one_rank(rank: int, folder: str) -> None:
    """Two backward passes over two of four samples under DDP with gloo; rank 0 writes the averaged gradients."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    student = plain_student()
    student.load_state_dict(torch.load(f"{folder}/weights.pt", weights_only=True))
    wrapped = DistributedDataParallel(student)
    share = slice(2 * rank, 2 * rank + 2)
    batch = [value[share] for value in plain_inputs(4, dtype=torch.float64)]
    whole = features(4, dtype=torch.float64)
    for _ in range(2):
        wrapped.zero_grad()
        total_loss(wrapped(*batch), TeacherFeatures(whole.patch_tokens[share], whole.grid)).backward()
    if rank == 0:
        torch.save(gradients(student), f"{folder}/gradients.pt")
    # The wrapper holds the process group: freed after a peer has gone, gloo now and then waits for it for ever.
    torch.distributed.barrier()
    del wrapped
    torch.distributed.destroy_process_group()
