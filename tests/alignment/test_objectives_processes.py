"""Two processes with half the batch each give the gradient of one process with the whole batch.

The file is also the program that the two processes run: `python <file> RANK RENDEZVOUS RESULT`.
"""

import subprocess
import sys
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from diffusers_srepa.alignment.objectives.base import AlignmentObjective
from diffusers_srepa.alignment.objectives.batch import (
    BatchCKAAlignment,
    DispersiveAlignment,
    SimilarityPreservingAlignment,
)
from diffusers_srepa.alignment.objectives.relational import GramKLAlignment, GramMSEAlignment
from diffusers_srepa.tokens import TokenMap


OBJECTIVES: dict[str, AlignmentObjective] = {
    "gram": GramMSEAlignment(form="gram"),
    "feature": GramMSEAlignment(form="feature"),
    "kl": GramKLAlignment(),
    "similarity_preserving": SimilarityPreservingAlignment(),
    "batch_cka": BatchCKAAlignment(),
    "dispersive": DispersiveAlignment(),
}
BATCH = 4


def losses_and_gradients(rank: int, num_processes: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """For each objective the loss of this process's share of the batch and the gradient of a shared projector."""
    generator = torch.Generator().manual_seed(0)
    share = slice(rank * BATCH // num_processes, (rank + 1) * BATCH // num_processes)
    hidden = torch.randn(BATCH, 6, 5, generator=generator, dtype=torch.float64)[share]
    target = torch.randn(BATCH, 6, 3, generator=generator, dtype=torch.float64)[share]
    projector = torch.nn.Linear(5, 4, dtype=torch.float64)
    with torch.no_grad():
        projector.weight.copy_(torch.randn(4, 5, generator=generator, dtype=torch.float64))
        projector.bias.fill_(0.1)
    module = DistributedDataParallel(projector) if num_processes > 1 else projector
    results = {}
    for name, objective in OBJECTIVES.items():
        projector.zero_grad()
        loss = objective(TokenMap(module(hidden), (2, 3)), TokenMap(target, (2, 3))).mean()
        loss.backward()
        results[name] = (loss.detach(), projector.weight.grad.clone())
    return results


def test_two_processes_equal_one(tmp_path: Path):
    expected = losses_and_gradients(0, 1)
    results = [tmp_path / f"rank{rank}.pt" for rank in range(2)]
    command = [sys.executable, __file__]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "rendezvous"), str(result)], stderr=subprocess.PIPE)
        for rank, result in enumerate(results)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    outputs = [torch.load(result, weights_only=True) for result in results]
    for name, objective in OBJECTIVES.items():
        loss, gradient = expected[name]
        values = torch.stack([output[name][0] for output in outputs])
        if objective.scope == "batch":
            torch.testing.assert_close(values, loss.expand(2), msg=name)
        else:
            torch.testing.assert_close(values.mean(), loss, msg=name)
        assert gradient.abs().max() > 1e-6
        for output in outputs:
            torch.testing.assert_close(output[name][1], gradient, rtol=1e-9, atol=1e-12)


def main() -> None:
    rank, rendezvous, result = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    torch.save(losses_and_gradients(rank, 2), result)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
