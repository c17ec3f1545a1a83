"""Taps read one forward of one module, whatever wraps, copies, checkpoints or compiles it."""

import copy
import gc
import io
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffusers_srepa.errors import ConfigurationError
from diffusers_srepa.hooks import FeatureTap, block_list, find_submodule, unwrap_module
from tests.helpers.reference_weights import TAP, golden_inputs, golden_model


class Block(nn.Module):
    """A block that returns a tuple, as those of many `transformers` models do."""

    def __init__(self, as_tuple: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.as_tuple = as_tuple

    def forward(self, x: torch.Tensor):
        x = x + torch.tanh(self.linear(x))
        return (x, "attention") if self.as_tuple else x


class Stack(nn.Module):
    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.unused = nn.Linear(4, 4)
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = (block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant))[0]
        return x


def read(tap: FeatureTap, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with tap:
        model(x)
        return tap.pop()


def test_reads_the_golden_hidden_state_of_block_2():
    model = golden_model("repa")
    with FeatureTap(model, TAP) as tap, torch.no_grad():
        model(**golden_inputs())
        hidden = tap.pop()
    assert hidden.shape == (2, 16, 32)
    assert hidden.sum().item() == pytest.approx(544.722721, abs=1e-4)
    assert hidden.abs().sum().item() == pytest.approx(626.426834, abs=1e-4)
    first = torch.tensor([-0.036546, 0.105099, 0.168294, 0.064199], dtype=torch.float64)
    last = torch.tensor([1.001133, 0.970526, 0.783914, 0.866379], dtype=torch.float64)
    torch.testing.assert_close(hidden.flatten()[:4], first, atol=1e-5, rtol=0)
    torch.testing.assert_close(hidden.flatten()[-4:], last, atol=1e-5, rtol=0)


def test_reads_the_first_entry_of_a_tuple_with_its_gradient():
    model, x = Stack(), torch.randn(2, 3, 4)
    hidden = read(FeatureTap(model, "blocks.1"), model, x)
    torch.testing.assert_close(hidden, model.blocks[1](model.blocks[0](x)[0])[0])
    hidden.sum().backward()
    assert model.blocks[0].linear.weight.grad.abs().sum() > 0
    assert model.blocks[2].linear.weight.grad is None


def test_leaves_the_output_of_the_model_alone():
    model, x = Stack(), torch.randn(2, 3, 4)
    before = model(x)
    tap = FeatureTap(model, "blocks.1")
    with tap:
        assert torch.equal(model(x), before)


def test_refuses_outputs_that_hold_no_tensor():
    class Named(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"hidden": x}

    model = nn.Sequential(Named())
    with FeatureTap(model, "0"), pytest.raises(ConfigurationError, match="'0' returns a dict"):
        model(torch.randn(1, 4))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("transformer_blocks.3", "entries 0 to 2"),
        ("transformer_blocks.-1", "entries 0 to 2"),
        ("transformer_block.1", "did you mean 'transformer_blocks'"),
        (
            "transformer_blocks.1.atn",
            "'transformer_blocks.1' of SiTTransformer2DModel has no 'atn': did you mean 'attn'",
        ),
        ("patch_embed.proj.weight", "no submodules at all"),
        ("config", "does not exist"),
        ("", "is empty"),
    ],
)
def test_wrong_paths_name_what_is_there(path, message):
    with pytest.raises(ConfigurationError, match=message) as error:
        FeatureTap(golden_model("repa"), path)
    assert str(error.value).count(". ") == 0 and str(error.value).endswith(".")


def test_unarmed_forwards_leave_nothing_behind():
    model = Stack()
    tap = FeatureTap(model, "blocks.1")
    model(torch.randn(1, 2, 4))
    with pytest.raises(ConfigurationError, match="did not run"):
        tap.pop()


def test_holds_nothing_after_the_forward():
    model, x = Stack(), torch.randn(1, 2, 4)
    tap = FeatureTap(model, "blocks.1")
    popped = weakref.ref(read(tap, model, x))
    with tap:
        model(x)
        unread = weakref.ref(tap._feature)
    with pytest.raises(ValueError, match="stop"), tap:
        model(x)
        lost = weakref.ref(tap._feature)
        raise ValueError("stop")
    gc.collect()
    assert popped() is None and unread() is None and lost() is None


def test_a_module_that_does_not_run_or_runs_twice_is_an_error():
    model, x = Stack(), torch.randn(1, 2, 4)
    with pytest.raises(ConfigurationError, match="'unused' did not run"):
        read(FeatureTap(model, "unused"), model, x)
    with FeatureTap(model, "blocks.0"), pytest.raises(ConfigurationError, match="ran twice"):
        model(model(x))


def test_a_copied_model_does_not_overwrite_the_features_of_the_original():
    model, x = Stack(), torch.randn(1, 2, 4)
    tap = FeatureTap(model, "blocks.1")
    average = copy.deepcopy(model)
    with tap:
        model(x)
        with torch.no_grad():
            average(x + 1)
        hidden = tap.pop()
    assert hidden.requires_grad
    torch.testing.assert_close(hidden, model.blocks[1](model.blocks[0](x)[0])[0])


def test_a_copy_made_together_with_its_tap_works_and_is_its_own():
    model, x = Stack(), torch.randn(1, 2, 4)
    tap = FeatureTap(model, "blocks.1")
    with tap:
        model(x)
        # The tap holds a tensor inside the graph here, which cannot be copied.
        model_copy, tap_copy = copy.deepcopy((model, tap))
    nn.init.zeros_(model_copy.blocks[0].linear.weight)
    expected = model_copy.blocks[1](model_copy.blocks[0](x)[0])[0]
    torch.testing.assert_close(read(tap_copy, model_copy, x), expected)
    assert not torch.allclose(read(tap, model, x), expected)
    tap_copy.remove()
    assert len(model_copy.blocks[1]._forward_hooks) == 0 and len(model.blocks[1]._forward_hooks) == 1


def test_pickles_empty_and_adds_nothing_to_the_state_dict():
    model, x = Stack(), torch.randn(1, 2, 4)
    names = list(model.state_dict())
    tap = FeatureTap(model, "blocks.1")
    assert list(model.state_dict()) == names
    buffer = io.BytesIO()
    with tap:
        model(x)
        torch.save((model, tap), buffer)
    buffer.seek(0)
    loaded, loaded_tap = torch.load(buffer, weights_only=False)
    with pytest.raises(ConfigurationError, match="did not run"):
        loaded_tap.pop()
    torch.testing.assert_close(read(loaded_tap, loaded, x), read(tap, model, x))


def test_gradient_checkpointing_gives_the_same_gradients_and_leaves_nothing():
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    plain = Stack().double()
    checkpointed = Stack(reentrant=False).double()
    checkpointed.load_state_dict(plain.state_dict())
    taps = {model: FeatureTap(model, "blocks.1") for model in (plain, checkpointed)}
    for model, tap in taps.items():
        with tap:
            output, hidden = model(x), tap.pop()
        (output.square().sum() + hidden.pow(3).sum()).backward()
        assert tap._feature is None
    for one, other in zip(plain.blocks.parameters(), checkpointed.blocks.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_is_refused_because_its_features_have_no_gradient():
    model = Stack(reentrant=True)
    tap = FeatureTap(model, "blocks.1")
    with pytest.raises(ConfigurationError, match="use_reentrant=False"):
        read(tap, model, torch.randn(2, 3, 4, requires_grad=True))
    with torch.no_grad():
        assert read(tap, model, torch.randn(2, 3, 4)).shape == (2, 3, 4)


def test_compiles_without_graph_breaks_when_attached_before_the_first_call():
    model, x = Stack(), torch.randn(2, 3, 4)
    tap = FeatureTap(model, "blocks.1")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    hidden = read(tap, compiled, x)
    torch.testing.assert_close(hidden, model.blocks[1](model.blocks[0](x)[0])[0])
    torch.testing.assert_close(compiled(x), model(x))
    late = FeatureTap(compiled, "blocks.2")
    with pytest.raises(ConfigurationError, match="before the first compiled call"):
        read(late, compiled, x)


def test_looks_through_the_wrappers_of_compile_data_parallelism_and_peft():
    model = Stack()
    block = model.blocks[1]
    model.blocks[1] = torch.compile(block, backend="eager")
    assert find_submodule(model, "blocks.1") is block
    assert find_submodule(model, "blocks.1.linear") is block.linear
    assert find_submodule(nn.DataParallel(torch.compile(model, backend="eager")), "blocks.1") is block
    adapted = get_peft_model(Stack(), LoraConfig(target_modules=["linear"]))
    assert unwrap_module(adapted) is adapted.base_model.model
    assert read(FeatureTap(adapted, "blocks.1"), adapted, torch.randn(1, 2, 4)).shape == (1, 2, 4)


def test_removed_taps_leave_no_hook():
    model = Stack()
    tap = FeatureTap(model, "blocks.1")
    tap.remove()
    assert all(not module._forward_hooks for module in model.modules())


def test_lists_of_blocks_are_found_by_name():
    model = golden_model("repa")
    name, blocks = block_list(model)
    assert name == "transformer_blocks" and blocks is model.transformer_blocks
    assert block_list(Stack())[0] == "blocks"
    with pytest.raises(ConfigurationError, match="give the path of a module as `tap`"):
        block_list(nn.Linear(1, 1))


class _TwoStreams(nn.Module):
    def forward(self, text: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return 2 * text, 3 * image


def test_of_two_streams_one_has_to_be_named() -> None:
    model = nn.ModuleDict({"block": _TwoStreams()})
    text, image = torch.ones(1, 4, 2), torch.ones(1, 4, 2)
    with FeatureTap(model, "block:1") as tap:
        model["block"](text, image)
        assert torch.equal(tap.pop(), 3 * image)
    with FeatureTap(model, "block"), pytest.raises(ConfigurationError, match="returns 2 tensors of tokens.*block:1"):
        model["block"](text, image)


def test_a_number_that_is_none_or_too_large_is_refused() -> None:
    model = nn.ModuleDict({"block": _TwoStreams()})
    with pytest.raises(ConfigurationError, match="behind the colon"):
        FeatureTap(model, "block:last")
    with FeatureTap(model, "block:2"), pytest.raises(ConfigurationError, match="returns 2 entries"):
        model["block"](torch.ones(1, 4, 2), torch.ones(1, 4, 2))
