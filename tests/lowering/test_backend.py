"""torch.compile(backend="bitfold"): what it computes, when it folds anew, what it shares and refuses.

Most of it runs on the reference target, which starts no compiler; the CPU target has `test_backend_cpu.py`.
"""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import bitfold as bf
from bitfold.lowering import backend
from bitfold.lowering.options import Options
from bitfold.lowering.reference import ReferenceTarget
from bitfold.passes import Trace


class Net(nn.Module):
    """Tied embedding and head around a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(48, 64)
        self.fc = nn.Linear(64, 64)
        self.head = nn.Linear(64, 48, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.relu(self.fc(self.embed(tokens))))


TOKENS = torch.arange(6).reshape(2, 3)


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend=backend.bitfold, options={"target": "reference", **options})


def reference(model: nn.Module, tokens: Tensor, recipe: str = "int8") -> Tensor:
    """The same recipe in the program scope, run eagerly."""
    gm = bf.capture(model, (tokens,))
    bf.Pipeline.parse(f"annotate{{recipe={recipe}}},fold").run(gm)
    with torch.inference_mode():
        return gm(tokens)


@pytest.mark.parametrize("recipe", ["int8", "int8_all", "int4[g32]", "mxfp4", "int8_dynamic"])
def test_it_computes_what_the_program_scope_does(recipe: str) -> None:
    model = Net().eval()
    before = copy.deepcopy(model.state_dict())
    with torch.inference_mode():
        assert torch.equal(compiled(model, recipe=recipe)(TOKENS), reference(model, TOKENS, recipe))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture
def recording() -> Iterator[list[list[Tensor]]]:
    """The uint8 inputs (codes) of every call of a graph compiled for the target `recording`."""
    calls: list[list[Tensor]] = []

    class Recording(ReferenceTarget):
        name = "recording"

        def compile(self, gm: GraphModule, example_inputs: Sequence[Any], config: Any) -> Any:
            def run(*args: Any) -> Any:
                calls.append([arg for arg in args if isinstance(arg, Tensor) and arg.dtype == torch.uint8])
                return gm.forward(*args)

            return run

    from bitfold.lowering import target

    target._registered["recording"] = Recording
    yield calls
    del target._registered["recording"]


def test_two_graphs_share_one_copy_of_the_codes(recording: list[list[Tensor]]) -> None:
    model = Net().eval()
    traces: list[Trace] = []
    fast = torch.compile(
        model,
        backend=backend.bitfold,
        dynamic=False,
        options={"recipe": "int8_all", "target": "recording", "trace": traces},
    )
    with torch.inference_mode():
        fast(TOKENS), fast(TOKENS[:, :1])
    assert len(traces) == 2
    prefill, decode = recording
    assert len(prefill) == 2  # fc, and head tied to embed
    assert [codes.data_ptr() for codes in prefill] == [codes.data_ptr() for codes in decode]


def test_a_parameter_changed_in_place_is_folded_anew_into_the_same_tensors(
    recording: list[list[Tensor]],
) -> None:
    model = Net().eval()
    fast = compiled(model, recipe="int4[g32]", target="recording")
    with torch.inference_mode():
        fast(TOKENS)
    with torch.no_grad():
        model.fc.weight.mul_(-2.0).add_(0.1)
    model.head.load_state_dict({"weight": torch.randn(48, 64)})
    with torch.no_grad():
        assert torch.equal(fast(TOKENS), reference(model, TOKENS, "int4[g32]"))
    assert [codes.data_ptr() for codes in recording[0]] == [codes.data_ptr() for codes in recording[1]]


def test_exchanged_data_and_exchanged_parameters_are_seen() -> None:
    model = Net().eval()
    fast = compiled(model)
    with torch.inference_mode():
        fast(TOKENS)
        model.fc.weight.data = torch.randn(64, 64)
        assert torch.equal(fast(TOKENS), reference(model, TOKENS))
        model.fc.weight = nn.Parameter(torch.randn(64, 64))
        assert torch.equal(fast(TOKENS), reference(model, TOKENS))


def test_blocks_that_share_a_graph_keep_their_own_codes() -> None:
    blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(3)).eval()
    traces: list[Trace] = []

    def through(block: nn.Module, x: Tensor) -> Tensor:
        return block(x)

    fast = compiled(through, recipe="int8", trace=traces)
    x = torch.randn(2, 64)
    with torch.inference_mode():
        for block in [*blocks, *blocks]:
            assert torch.equal(fast(block, x), reference(block, x))
    assert len(traces) == 1


def test_codes_die_with_their_parameters() -> None:
    model = Net().eval()
    with torch.inference_mode():
        compiled(model)(TOKENS)
    weight = weakref.ref(model.fc.weight)
    assert model.fc.weight in backend._store._kept
    del model
    torch._dynamo.reset()
    gc.collect()
    assert weight() is None


def test_a_training_graph_warns_and_trains() -> None:
    model = Net()
    with pytest.warns(UserWarning, match=r"runs unquantized: call the model under torch.inference_mode\(\)"):
        out = compiled(model)(TOKENS)
    assert torch.equal(out, model(TOKENS))
    out.sum().backward()
    assert model.fc.weight.grad is not None


def test_inference_folds_a_training_graph_anyway() -> None:
    model = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = compiled(model, inference=True)(TOKENS)
    assert torch.equal(out, reference(model, TOKENS))
    assert not out.requires_grad


def test_a_varying_size_stays_one_graph() -> None:
    model = Net().eval()
    traces: list[Trace] = []
    fast = torch.compile(
        model, backend=backend.bitfold, dynamic=True, options={"target": "reference", "trace": traces}
    )
    with torch.inference_mode():
        for length in (3, 4, 7, 19):
            tokens = torch.arange(2 * length).reshape(2, length)
            assert torch.equal(fast(tokens), reference(model, tokens))
    assert len(traces) == 1
    assert "s" in "".join(str(node.shape) for node in traces[0].steps[-1].snapshot)


def test_what_went_into_a_constant_is_watched() -> None:
    model = Net().eval()
    pipeline = 'annotate{recipe=int8},sparsify{pattern="2:4"},fold'
    fast = compiled(model, pipeline=pipeline)
    with torch.no_grad():
        first = fast(TOKENS)
        assert torch.equal(first, fast(TOKENS))
        model.fc.weight.mul_(2.0)
        try:
            again = fast(TOKENS)
        except bf.BitfoldError as error:
            assert "has changed since its graph was compiled" in str(error)
        else:
            fresh = compiled(copy.deepcopy(model), pipeline=pipeline)
            assert torch.equal(again, fresh(TOKENS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recpie": "int4"}, "no option 'recpie'; did you mean 'recipe'"),
        ({"recipe": "int44"}, "int44"),
        ({"recipe": "int8", "pipeline": "annotate"}, "both a recipe and a pipeline"),
        ({"pipeline": "annotate,fodl"}, "there is no pass 'fodl'; did you mean 'fold'"),
        ({"target": "cup"}, "there is no target 'cup'; did you mean 'cpu'"),
        ({"mode": "max-autotun"}, "there is no mode 'max-autotun'; did you mean 'max-autotune"),
        (
            {"inductor": {"max_autotun": 1}},
            "Inductor has no option 'max_autotun'; did you mean 'max_autotune",
        ),
        ({"inductor": True}, "dictionary of Inductor's options"),
        ({"inference": "yes"}, "True or False, not 'yes'"),
        ({"trace": 3}, "a path, a list, or a function of a Trace"),
        ({"trace": "page.html"}, "bitfold.viz"),
        ({"trace": "/no/such/folder/t.txt"}, "there is no folder"),
    ],
)
def test_a_wrong_option_is_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(bf.BitfoldError) as raised:
        Options.parse(options)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_mode_and_inductor_options_go_to_inductor() -> None:
    given = {"mode": "max-autotune", "inductor": {"max-autotune": False, "cpp.threads": 2}}
    config = Options.parse(given).config()
    assert config["max_autotune"] is False
    assert config["cpp.threads"] == 2
    assert Options.parse({"mode": "default"}).config() == {}
    assert Options.parse({}).config() == {}


def test_trace_goes_to_a_function_a_list_or_a_file(tmp_path: Path) -> None:
    model = Net().eval()
    traces: list[Trace] = []
    for sink in (traces, traces.append, tmp_path / "trace.txt", str(tmp_path / "trace.txt")):
        torch._dynamo.reset()
        with torch.inference_mode():
            compiled(model, trace=sink)(TOKENS)
    assert [len(trace.steps) for trace in traces] == [5, 5]  # captured, annotate, fold, fuse, lower
    assert (tmp_path / "trace.txt").read_text().count("lower") == 2


def test_a_pipeline_replaces_the_default_one() -> None:
    model = Net().eval()
    traces: list[Trace] = []
    with torch.inference_mode():
        out = compiled(model, pipeline="annotate{recipe=int4[g32]},fold", trace=traces)(TOKENS)
    assert torch.equal(out, reference(model, TOKENS, "int4[g32]"))
    assert [step.name for step in traces[0].steps] == ["captured", "annotate", "fold"]


def test_autocast_is_one_clear_error() -> None:
    model = Net().eval()
    with (
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(Exception, match=r"does not compile under torch.autocast; cast the model"),
    ):
        compiled(model)(TOKENS)


def test_a_region_that_switches_autocast_off_is_no_mistake() -> None:
    fc = nn.Linear(64, 64).eval()

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            y = x * 2
        return fc(y)

    x = torch.randn(2, 64)
    with torch.inference_mode():
        assert torch.equal(compiled(forward)(x), reference(fc, x * 2))


def test_a_recipe_that_calibrates_says_where_to_go() -> None:
    recipe = bf.Recipe("static", (bf.Rule(weight="int8", input="int8[tensor]", observer="minmax"),))
    wanted = r"use bitfold.quantize\(model, recipe, calibration="
    with torch.inference_mode(), pytest.raises(Exception, match=wanted):
        compiled(Net().eval(), recipe=recipe)(TOKENS)


def test_a_layer_that_cannot_comply_is_named() -> None:
    with torch.inference_mode(), pytest.raises(Exception, match=r"layer fc: .* group of 48 does not divide"):
        compiled(Net().eval(), recipe="int4[g48]")(TOKENS)


def test_bf16_models_fold_too() -> None:
    model = Net().eval().to(torch.bfloat16)
    with torch.inference_mode():
        out = compiled(model, recipe="int4[g32]")(TOKENS)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, reference(model, TOKENS, "int4[g32]"))


def test_a_recipe_that_matches_nothing_says_so() -> None:
    model = Net().eval()
    nothing = bf.Recipe("typo", (bf.Rule(match="encoder.*", weight="int8"),))
    with torch.inference_mode():
        with pytest.warns(UserWarning, match="recipe 'typo' matches no layer of this graph"):
            out = compiled(model, recipe=nothing)(TOKENS)
        assert torch.equal(out, model(TOKENS))
        torch._dynamo.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            compiled(torch.relu)(torch.randn(3))
            compiled(bf.quantize(model, "int8_all", target="reference"))(TOKENS)


def test_a_parameter_without_a_version_is_told_about() -> None:
    with torch.inference_mode():
        model = Net().eval()
        with pytest.warns(UserWarning, match=r"made under torch.inference_mode\(\), so bitfold cannot"):
            compiled(model)(TOKENS)
