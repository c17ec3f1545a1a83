"""A short aligned training whose alignment ends in the middle, light enough to import in spawned processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from diffusers_srepa.alignment.loss import AlignmentLoss
from diffusers_srepa.alignment.objectives.pointwise import CosineAlignment
from diffusers_srepa.alignment.objectives.relational import GramMSEAlignment
from diffusers_srepa.alignment.schedule import HardStop
from diffusers_srepa.teachers.auto_teacher import Teacher
from tests.helpers.aligned_step import plain_inputs, plain_student


STOP, STEPS, BATCH = 2, 5, 4


def train(folder: str, rank: int, num_processes: int) -> dict[str, Any]:
    """SGD on one batch, shared out to the processes: weights after every step, and the teacher's calls."""
    student = plain_student()
    student.load_state_dict(torch.load(f"{folder}/weights.pt", weights_only=True))
    teacher = Teacher.from_pretrained(f"{folder}/teacher", grid=(4, 4))
    calls: list[int] = []
    criterion = AlignmentLoss(
        {
            "cosine": (CosineAlignment(), HardStop(STOP)),
            "gram_mse": (GramMSEAlignment(), HardStop(STOP, value=2.0)),
        }
    )
    share = slice(rank * BATCH // num_processes, (rank + 1) * BATCH // num_processes)
    batch = [value[share] for value in plain_inputs(BATCH, dtype=torch.float64)]
    images = torch.rand(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(3))[share]
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    wrapped = DistributedDataParallel(student) if num_processes > 1 else student
    history = []
    for step in range(STEPS):
        ended = set(student.features) - set(criterion.features(step))
        if ended:
            student.stop_features(ended)
            # DDP waits for the gradient of every parameter that it knew of, a frozen projector's included.
            wrapped = DistributedDataParallel(student) if num_processes > 1 else student
        velocity, tokens = wrapped(*batch)
        features = None
        if criterion.teachers(step):
            calls.append(step)
            features = teacher(images)
        loss = velocity.square().mean() + criterion(tokens, features, step=step).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append({name: parameter.detach().clone() for name, parameter in student.named_parameters()})
    frozen = [name for name, parameter in student.named_parameters() if not parameter.requires_grad]
    return {"history": history, "calls": calls, "frozen": frozen, "taps": list(student.taps)}


def train_one_rank(rank: int, folder: str) -> None:
    """The same by one of two processes, its results in `folder`."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(train(folder, rank, 2), Path(folder) / f"rank{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
