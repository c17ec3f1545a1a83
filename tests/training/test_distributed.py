"""Wrong launches are refused before anything is loaded."""

from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from diffusers_srepa.configuration.sections import LoopConfig
from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.training.distributed import (
    _check_environment,
    _check_processes,
    micro_batch_size,
    prepare_sharding,
    resolve_precision,
)


def _state(num_processes: int, kind: DistributedType = DistributedType.NO) -> SimpleNamespace:
    # The two attributes of an Accelerator that the check reads; a real one cannot pretend to be eight processes.
    return SimpleNamespace(num_processes=num_processes, distributed_type=kind)


def test_a_master_without_a_world_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="--multi_gpu --num_processes N"):
        _check_environment({"MASTER_ADDR": "127.0.0.1"})
    _check_environment({"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"})
    _check_environment({})


def test_other_numbers_of_processes_than_expected_are_refused() -> None:
    _check_processes(_state(2), None)
    _check_processes(_state(2), 2)
    with pytest.raises(ConfigurationError, match="1 processes are running, but expected_processes is 2"):
        _check_processes(_state(1), 2)


def test_deepspeed_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="DeepSpeed was asked for"):
        _check_processes(_state(2, DistributedType.DEEPSPEED), None)


@pytest.mark.parametrize(
    "processes, plugin, message",
    [
        (1, {"fsdp_version": 2}, "there is one process"),
        (2, {"fsdp_version": 1}, "only version 2 is supported"),
        (2, {"fsdp_version": 2, "activation_checkpointing": True}, "set --model.gradient_checkpointing"),
    ],
)
def test_kinds_of_fsdp_that_cannot_work_are_refused(
    monkeypatch: pytest.MonkeyPatch, processes: int, plugin: dict[str, Any], message: str
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    state = SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin(**plugin))
    accelerator: Any = SimpleNamespace(num_processes=processes, distributed_type=DistributedType.FSDP, state=state)
    with pytest.raises(ConfigurationError, match=message):
        prepare_sharding(accelerator)


@pytest.mark.parametrize(
    "global_size, micro, processes, expected", [(256, None, 8, 32), (256, 16, 8, 16), (8, 4, 1, 4), (8, None, 1, 8)]
)
def test_micro_batches(global_size: int, micro: int | None, processes: int, expected: int) -> None:
    loop = LoopConfig(global_batch_size=global_size, micro_batch_size=micro)
    assert micro_batch_size(loop, processes) == expected


@pytest.mark.parametrize("global_size, micro, processes", [(10, None, 4), (8, 3, 1), (8, 8, 2)])
def test_batches_that_do_not_divide_are_refused(global_size: int, micro: int | None, processes: int) -> None:
    with pytest.raises(ConfigurationError, match="global_batch_size"):
        micro_batch_size(LoopConfig(global_batch_size=global_size, micro_batch_size=micro), processes)


@pytest.mark.parametrize(
    "option, launched, expected",
    [(None, None, "bf16"), ("no", None, "no"), (None, "no", "bf16"), ("fp16", "no", "fp16")]
    + [(None, "fp16", "fp16"), (None, "bf16", "bf16"), ("bf16", "bf16", "bf16")],
)
def test_the_launcher_s_precision_wins_over_the_default(
    option: str | None, launched: str | None, expected: str
) -> None:
    environment = {} if launched is None else {"ACCELERATE_MIXED_PRECISION": launched}
    assert resolve_precision(option, environment) == expected


@pytest.mark.parametrize("option, launched", [("no", "bf16"), ("bf16", "fp16"), (None, "fp8")])
def test_a_precision_that_the_launcher_contradicts_is_refused(option: str | None, launched: str) -> None:
    with pytest.raises(ConfigurationError, match=f"asked for.* {launched}"):
        resolve_precision(option, {"ACCELERATE_MIXED_PRECISION": launched})
