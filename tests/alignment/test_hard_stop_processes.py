"""HASTE's hard stop under DDP: the teacher is called no more, the projector rests, the model trains on."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import multiprocessing
from transformers import Dinov2Config, Dinov2Model

from tests.helpers.aligned_step import plain_student
from tests.helpers.hard_stop_run import STEPS, STOP, train, train_one_rank


def test_two_processes_stop_like_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=1, image_size=32, patch_size=8
    )
    Dinov2Model(config).save_pretrained(tmp_path / "teacher")
    torch.save(plain_student().state_dict(), tmp_path / "weights.pt")
    alone = train(str(tmp_path), 0, 1)
    multiprocessing.spawn(train_one_rank, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]

    for result in (alone, *ranks):
        assert result["calls"] == list(range(STOP)) and result["taps"] == []
        projector = [name for name in result["history"][0] if name.startswith("projectors.")]
        assert projector and result["frozen"] == projector
        before, at_stop, end = (result["history"][step] for step in (STOP - 2, STOP - 1, STEPS - 1))
        for name in projector:
            assert not torch.equal(before[name], at_stop[name]) and torch.equal(at_stop[name], end[name]), name
        for name in set(end) - set(projector):
            assert not torch.equal(at_stop[name], end[name]), name
    for step in range(STEPS):
        for name, expected in alone["history"][step].items():
            for result in ranks:
                torch.testing.assert_close(result["history"][step][name], expected, rtol=1e-6, atol=1e-9, msg=name)
