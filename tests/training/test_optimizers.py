"""Optimiser, schedule and the moving average."""

import logging

import pytest
import torch
from accelerate import PartialState
from torch import nn

from diffusers_srepa.configuration.sections import OptimizerConfig
from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.training.optimizers import EMA, build_optimizer, learning_rate, warn_if_average_is_young


def test_the_optimizer_has_the_paper_s_settings() -> None:
    group = build_optimizer(nn.Linear(2, 2).parameters(), OptimizerConfig()).param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (1e-4, (0.9, 0.999), 0.0, 1e-8)


def test_the_learning_rate_is_a_function_of_the_step() -> None:
    config = OptimizerConfig(lr=2.0, lr_schedule="constant_with_warmup", lr_warmup_steps=4)
    rate = learning_rate(config, max_steps=10)
    assert [rate(step) for step in (0, 1, 2, 3, 4, 5, 1)] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0, 0.5]
    cosine = learning_rate(OptimizerConfig(lr=2.0, lr_schedule="cosine"), max_steps=4)
    assert [cosine(step) for step in range(5)] == pytest.approx([2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5, 0.0])


@pytest.mark.parametrize("name", ["constnt", "piecewise_constant"])
def test_schedules_that_cannot_be_used_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="optimizer.lr_schedule"):
        learning_rate(OptimizerConfig(lr_schedule=name), max_steps=10)


def test_the_decay_is_constant_from_the_first_update_on() -> None:
    module = nn.Linear(3, 2)
    average = EMA({"m": module}, decay=0.9)
    expected = {name: parameter.detach().clone().double() for name, parameter in module.named_parameters()}
    for update in range(5):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.full_like(parameter, update + 1.0))
        average.update()
        expected = {name: 0.9 * value + 0.1 * (update + 1.0) for name, value in expected.items()}
    for name, value in average.of_module("m").items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-6)


def test_the_average_is_applied_and_taken_back() -> None:
    module = nn.Linear(3, 2)
    average = EMA({"m": module}, decay=0.5)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    with torch.no_grad():
        module.weight.add_(1.0)
    average.update()
    trained = module.weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(module.weight, before["weight"] + 0.5)
    assert torch.equal(module.weight, trained)
    with pytest.raises(RuntimeError, match="sampling failed"), average.applied():
        raise RuntimeError("sampling failed")
    assert torch.equal(module.weight, trained)


def test_a_restored_average_goes_on_as_before() -> None:
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    average, copy = EMA({"m": module}, decay=0.7), None
    for step in range(6):
        if step == 3:
            copy = EMA({"m": module}, decay=0.7)
            copy.load({name: value.clone() for name, value in average.averages.items()})
        with torch.no_grad():
            module.weight.normal_()
        average.update()
        if copy is not None:
            copy.update()
    assert copy is not None
    for name, value in average.averages.items():
        assert torch.equal(value, copy.averages[name])


def test_another_model_s_average_is_refused() -> None:
    average = EMA({"m": nn.Linear(3, 2)}, decay=0.7)
    with pytest.raises(ValueError, match="another model's"):
        average.load({"m.weight": torch.zeros(2, 3)})


def test_a_young_average_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    PartialState(cpu=True)
    with caplog.at_level(logging.WARNING):
        warn_if_average_is_young(0.98, 300)
        assert not caplog.records
        warn_if_average_is_young(0.9999, 300)
    assert "97% of the initial weights" in caplog.text and "0.985" in caplog.text
