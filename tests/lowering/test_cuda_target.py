"""What the CUDA target makes of a graph, without a GPU: the same rewriting on tensors in main memory."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bitfold as bf
from bitfold.codegen import CodegenError, GemmSpec, kernel_layout
from bitfold.codegen.device import device
from bitfold.lowering import inductor, register_target
from bitfold.lowering import target as targets
from bitfold.lowering.cuda import target as cuda
from bitfold.lowering.cuda.target import CudaTarget
from bitfold.lowering.fused import parsed
from bitfold.passes import snapshot
from bitfold.passes.fuse import inline

LOWERED = """\
fused_default = bitfold.fused.default([x, first_weight_codes, first_weight_scales, first_bias], F)
getitem: bf16[2, 96] = getitem(fused_default, 0)
relu_1: bf16[2, 96] = aten.relu.default(getitem)
fused_default_1 = bitfold.fused.default([relu_1, second_weight_codes, second_weight_scales], G)
getitem_1: bf16[2, 32] = getitem(fused_default_1, 0)
"""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 96)
        self.second = nn.Linear(96, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.fixture
def here() -> object:
    @register_target
    class Here(CudaTarget):
        name = "here"
        device = "cpu"

    yield Here
    targets._registered.pop("here")


def lowered(dtype: torch.dtype, recipe: str) -> torch.fx.GraphModule:
    torch.manual_seed(0)
    gm = bf.capture(Net().to(dtype).eval(), (torch.randn(2, 64, dtype=dtype),))
    bf.Pipeline.parse(f'annotate{{recipe="{recipe}"}},fold,fuse,lower{{target=here}}').run(gm)
    inline(gm)
    gm.recompile()
    return gm


def test_linears_become_the_one_operator(here: object) -> None:
    gm = lowered(torch.bfloat16, "int4[g32]")
    first, second = (node for node in gm.graph.nodes if node.target is torch.ops.bitfold.fused.default)
    assert first.args[1] == "linear 96x64 bf16 int4[g32,halves64] bias"
    assert second.args[1] == "linear 32x96 bf16 int4[g32,halves128]"
    shown = "\n".join(str(node) for node in snapshot(gm) if node.op == "call_function") + "\n"
    assert shown.replace(repr(first.args[1]), "F").replace(repr(second.args[1]), "G") == LOWERED


def test_codes_are_those_of_the_canonical_layout(here: object) -> None:
    gm = lowered(torch.bfloat16, "int4[g32]")
    node = next(n for n in gm.graph.nodes if n.target is torch.ops.bitfold.fused.default)
    spec = parsed(node.args[1])
    codes, scales = (getattr(gm, str(part.target)) for part in node.args[0][1:3])
    torch.manual_seed(0)
    wanted = bf.format("int4[g32]").quantize(Net().to(torch.bfloat16).first.weight)
    assert torch.equal(spec.weight.unpack(codes, 64), wanted.format.unpack(wanted.codes, 64))
    assert scales.is_contiguous() and torch.equal(scales, wanted.scales.mT)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_modules_alike_share_one_body_and_know_their_codes(here: object, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Stack().bfloat16().eval(), torch.randn(2, 64, dtype=torch.bfloat16)
    reference = copy.deepcopy(model)
    bf.quantize(reference, "int4[g32]", target="reference")
    bf.quantize(model, "int4[g32]", target="here")
    assert len({layer.body for layer in model.layers}) == 1
    for layer, wanted in zip(model.layers, reference.layers, strict=True):
        assert torch.equal(layer.weight, wanted.weight)
        assert layer.folded_weights[0].format == "int4[g32,halves64]"
    path = tmp_path / "model.safetensors"
    bf.save(model, path)
    loaded = bf.load(path, into=Stack().bfloat16().eval(), target="reference")
    with torch.inference_mode():
        assert torch.equal(loaded(x), reference(x))


def test_a_cast_model_gets_kernels_of_the_new_type_or_none(here: object) -> None:
    torch.manual_seed(0)
    model = Stack().bfloat16().eval()
    bf.quantize(model, "int4[g32]", target="here")
    model.half()
    texts = [node.args[1] for node in model.layers[0].body.graph.nodes if node.op == "call_function"]
    assert texts[0] == "linear 64x64 f16 int4[g32,halves64] bias"
    model.float()
    x = torch.randn(2, 64)
    with torch.inference_mode():
        wanted = x
        for layer in model.layers:
            wanted = nn.functional.linear(wanted, layer.weight, layer.bias)
        assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("code", [0x7E, 0x7F])
def test_a_weight_with_a_nan_keeps_its_dequantize(here: object, code: int) -> None:
    torch.manual_seed(0)
    gm = bf.capture(Net().bfloat16().eval(), (torch.randn(2, 64, dtype=torch.bfloat16),))
    bf.Pipeline.parse('annotate{recipe="fp8"},fold,fuse').run(gm)
    gm.first_weight_codes.view(torch.uint8)[3, 5] = code  # the largest number, and NaN
    bf.Pipeline.parse("lower{target=here}").run(gm)
    inline(gm)
    fused = gm.graph.find_nodes(op="call_function", target=torch.ops.bitfold.fused.default)
    assert len(fused) == (2 if code == 0x7E else 1)


def test_float32_activations_stay_with_inductor(here: object) -> None:
    with pytest.warns(
        UserWarning, match="torch.float32, and kernels take bfloat16 or float16, so such linears"
    ):
        gm = lowered(torch.float32, "int4[g32]")
    assert not gm.graph.find_nodes(op="call_function", target=torch.ops.bitfold.fused.default)
    assert len(gm.graph.find_nodes(op="call_function", target=torch.ops.bitfold.dequantize.default)) == 2


def test_a_layout_that_no_kernel_walks_stays_as_it_is() -> None:
    for text in ("int4[g20]", "int4[g32,2:4]", "int8[native]"):
        assert CudaTarget().layout(bf.format(text), 160) == bf.format(text).layout


def test_shapes_are_known_without_running() -> None:
    form = kernel_layout(bf.format("int8"), 64)
    spec = GemmSpec(form, 48, 64)
    parts = [part.to("meta") for part in form.quantize(torch.randn(48, 64)).parts]
    x = torch.empty(5, 3, 64, dtype=torch.bfloat16, device="meta")
    (y,) = torch.ops.bitfold.fused([x, *parts], str(spec))
    assert y.shape == (5, 3, 48) and y.dtype == torch.bfloat16


def test_what_is_laid_out_for_a_gpu_is_refused_in_main_memory() -> None:
    form = kernel_layout(bf.format("int8"), 64)
    q = form.quantize(torch.randn(48, 64))
    # From Python before the operator in C++ is loaded, and from there after.
    with pytest.raises((CodegenError, RuntimeError), match="target cpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ops.bitfold.fused(
            [torch.ones(1, 64, dtype=torch.bfloat16), *q.parts], str(GemmSpec(form, 48, 64))
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("recipe", ["int4[g64]", "int8", "fp8", "mxfp4", "nvfp4", "nf4", "q4_1", "int3[g64]"])
def test_compiled_on_a_gpu_it_is_the_reference_within_rounding(recipe: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(512, 1536), nn.SiLU(), nn.Linear(1536, 512)).cuda().bfloat16().eval()
    reference = nn.Sequential(nn.Linear(512, 1536), nn.SiLU(), nn.Linear(1536, 512)).cuda().bfloat16().eval()
    reference.load_state_dict(net.state_dict())
    bf.quantize(reference, recipe, target="reference")
    fast = torch.compile(net, backend="bitfold", options={"recipe": recipe})
    with torch.inference_mode():
        for rows in (1, 16, 300):
            x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)
            wanted, found = reference(x).double(), fast(x).double()
            # Three bf16 roundings on the way (2**-9 each, relative, at most), none in the same place; and two
            # more where a table's entries are no bf16 numbers, and are rounded before the scale multiplies.
            roundings = 5 if recipe == "nf4" else 3
            assert (found - wanted).norm() / wanted.norm() < roundings * 2.0**-9


def test_inductors_launches_overlap_where_the_user_does_not_forbid_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[dict[str, object]] = []
    monkeypatch.setattr(inductor, "compiled", lambda gm, inputs, config: told.append(dict(config)))
    target = CudaTarget()
    monkeypatch.setattr(target, "missing", lambda: None)
    empty = torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())
    target.compile(empty, [], {"max_autotune": True})
    target.compile(empty, [], {"triton.enable_pdl": False})
    monkeypatch.setattr(cuda, "present", lambda: device("NVIDIA A100"))
    target.compile(empty, [], {})
    assert told == [{"triton.enable_pdl": True, "max_autotune": True}, {"triton.enable_pdl": False}, {}]
