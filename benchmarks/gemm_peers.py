"""Other people's GEMMs with quantized weights, as the benchmark calls them.

In: n, k. Out: `Loaded`: copies of one weight, how to run one on x, and the weight in float32 to check it by.

    PEERS["tinygemm"].load(4096, 4096)   ->   Loaded(copies=[…], nbytes=…, run=…, weight=…)

A package that cannot be imported raises ImportError from `load`; the benchmark reports it as absent. Each
peer is called the way its own documentation does, on weights that it has packed itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gemm_pairs import WITH_X
from gemm_rows import ALL
from gpu_timing import copies_past_cache
from torch import Tensor

GROUP = 128
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


def as_given(x: Tensor) -> tuple[Any, Tensor]:
    return x, x


@dataclass(frozen=True)
class Loaded:
    """nbytes: of one copy, scales included; weight: [n, k] float32 or None where the peer keeps it to itself;
    prepare: x in bf16 to (what `run` takes, what it stands for in float32)."""

    copies: list[Any]
    nbytes: int
    run: Callable[[Any, Any], Tensor]
    weight: Tensor | None
    prepare: Callable[[Tensor], tuple[Any, Tensor]] = as_given


@dataclass(frozen=True)
class Peer:
    """beside: our formats that it is compared with; compute: the type that its products are made in."""

    beside: tuple[str, ...]
    load: Callable[[int, int], Loaded]
    format: str = ""
    compute: str = "bf16"


def repeated(one: tuple[Tensor, ...], run: Callable[[Any, Any], Tensor], weight: Tensor | None) -> Loaded:
    """Copies of the tensors of one weight."""
    nbytes = sum(part.nbytes for part in one)
    others = [
        tuple(part.clone(memory_format=torch.preserve_format) for part in one)
        for _ in range(copies_past_cache(nbytes) - 1)
    ]
    return Loaded([one, *others], nbytes, run, weight)


def random_weight(n: int, k: int) -> Tensor:
    return torch.randn(n, k, device="cuda", dtype=BF16) * 0.02


def bf16(n: int, k: int) -> Loaded:
    weight = random_weight(n, k)
    return repeated((weight,), lambda w, x: torch.nn.functional.linear(x, w[0]), weight.float())


def tinygemm(n: int, k: int) -> Loaded:
    """Codes are stored two to a byte, the even one in the upper half; 8 is subtracted from them."""
    codes = torch.randint(0, 16, (n, k), device="cuda", dtype=torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    scale = (torch.rand(n, k // GROUP, device="cuda") * 0.01 + 0.001).to(BF16)
    offset = (torch.randn(n, k // GROUP, device="cuda") * 0.01).to(BF16)
    both = torch.stack([scale.t(), offset.t()], 2).contiguous()
    weight = (codes.float() - 8).view(n, -1, GROUP) * scale.float()[..., None] + offset.float()[..., None]
    return repeated(
        (packed, both),
        lambda w, x: torch.ops.aten._weight_int4pack_mm(x, w[0], GROUP, w[1]),
        weight.view(n, k),
    )


def mslk(n: int, k: int) -> Loaded:
    from mslk.quantize.shuffle import int4_row_quantize_zp, quantize_int4_preshuffle

    source = random_weight(n, k)
    codes, scale, middle = int4_row_quantize_zp(source, GROUP)
    packed, (scales, middles) = quantize_int4_preshuffle(source, group_size=GROUP, dtype="bf16")
    scale, middle = (part.to(BF16).float().t()[..., None] for part in (scale, middle))
    weight = codes.float().view(n, -1, GROUP) * scale + middle
    return repeated(
        (packed, scales, middles), lambda w, x: torch.ops.mslk.bf16i4bf16_shuffled(x, *w), weight.view(n, k)
    )


def modules(one: torch.nn.Module, weight: Tensor | None, beyond: tuple[str, ...] = ()) -> Loaded:
    """Copies of a module; tensors named in `beyond` are no part of its weight."""
    tensors = {**dict(one.named_parameters()), **dict(one.named_buffers())}
    nbytes = sum(part.nbytes for name, part in tensors.items() if name not in beyond)
    others = [copy.deepcopy(one) for _ in range(copies_past_cache(nbytes) - 1)]
    return Loaded([one, *others], nbytes, lambda module, x: module(x), weight)


def _gemlite() -> Any:
    import gemlite

    # The package chooses its tuned table by the card's name and has none for the H200.
    if not gemlite.load_config(str(Path(gemlite.__file__).parent / "configs" / "h100.json")):
        raise ImportError("gemlite lacks its table for the H100")
    return gemlite


def gemlite_uint4(n: int, k: int) -> Loaded:
    gemlite = _gemlite()
    kind = gemlite.DType.BF16
    layer = gemlite.GemLiteLinear(4, GROUP, k, n, input_dtype=kind, output_dtype=kind)
    codes = torch.randint(0, 16, (n, k), device="cuda", dtype=torch.uint8)
    scale = (torch.rand(n * k // GROUP, 1, device="cuda") * 0.01 + 0.001).to(BF16)
    layer.pack(codes, scale, torch.full_like(scale, 8), None)
    weight = (codes.float() - 8).view(-1, GROUP) * scale.float()
    return modules(layer, weight.view(n, k))


def gemlite_bytes(dtype: torch.dtype) -> Callable[[int, int], Loaded]:
    def load(n: int, k: int) -> Loaded:
        helper = _gemlite().helper
        source = random_weight(n, k).float()
        scale = source.abs().amax(1, keepdim=True) / 127
        codes = (source / scale).round().to(dtype)
        layer = helper.A16W8(device="cuda", dtype=BF16).from_weights(codes, scales=scale)
        return modules(layer, codes.float() * scale)

    return load


def gemlite_mxfp4(n: int, k: int) -> Loaded:
    linear = torch.nn.Linear(k, n, bias=False, device="cuda", dtype=BF16)
    return modules(_gemlite().helper.A16Wn(device="cuda", dtype=BF16).mxfp_from_linear(linear, 4), None)


def humming(weight: str, group: int, activation: str | None = None) -> Callable[[int, int], Loaded]:
    def load(n: int, k: int) -> Loaded:
        from humming.layer import HummingLayer

        layer = HummingLayer(
            shape_n=n, shape_k=k, torch_dtype=BF16,
            weight_config={"dtype": weight, **({"group_size": group} if group else {})},
            input_config={"dtype": activation} if activation else None,
        ).cuda()  # fmt: skip
        schema = layer.weight_schema
        tensors = type(schema).quant_tensor(random_weight(n, k), schema, BF16)
        layer.load_from_tensors(tensors)
        decoded = schema.dequant_tensors(tensors).float()
        layer.transform()
        return modules(layer, decoded, beyond=("locks",))

    return load


def scaled_mm(rows: bool) -> Callable[[int, int], Loaded]:
    def load(n: int, k: int) -> Loaded:
        weight = torch.randn(n, k, device="cuda").to(FP8)
        scale = torch.rand(1, n, device="cuda") + 0.5 if rows else torch.full((), 0.5, device="cuda")

        def prepare(x: Tensor) -> tuple[Any, Tensor]:
            of_x = (torch.rand(x.shape[0], 1, device="cuda") + 0.5) if rows else torch.ones((), device="cuda")
            return (x.to(FP8), of_x), x.to(FP8).float() * of_x

        def run(w: Any, given: Any) -> Tensor:
            x, of_x = given
            return torch._scaled_mm(x, w[0].t(), of_x, w[1], out_dtype=BF16, use_fast_accum=True)

        decoded = weight.float() * (scale.t() if rows else scale)
        made = repeated((weight, scale), run, decoded)
        return Loaded(made.copies, made.nbytes, run, decoded, prepare)

    return load


def int_mm(n: int, k: int) -> Loaded:
    weight = torch.randint(-127, 128, (n, k), device="cuda", dtype=torch.int8)

    def prepare(x: Tensor) -> tuple[Any, Tensor]:
        codes = (x.float() * 32).round().clamp(-127, 127).to(torch.int8)
        return codes, codes.float()

    made = repeated((weight,), lambda w, x: torch._int_mm(x, w[0].t()), weight.float())
    return Loaded(made.copies, made.nbytes, made.run, made.weight, prepare)


def scaled_mm_blocks(n: int, k: int) -> Loaded:
    """1 x 128 of x by 128 x 128 of the weight; scales of x lie with its rows side by side."""
    weight = torch.randn(n, k, device="cuda").to(FP8)
    scale = torch.rand(n // 128, k // 128, device="cuda") + 0.5

    def prepare(x: Tensor) -> tuple[Any, Tensor]:
        of_x = (torch.rand(k // 128, x.shape[0], device="cuda") + 0.5).t()
        return (x.to(FP8), of_x), x.to(FP8).float() * of_x.repeat_interleave(128, 1)

    def run(w: Any, given: Any) -> Tensor:
        x, of_x = given
        return torch._scaled_mm(x, w[0].t(), of_x, w[1].t(), out_dtype=BF16)

    decoded = weight.float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    made = repeated((weight, scale), run, decoded)
    return Loaded(made.copies, made.nbytes, run, decoded, prepare)


def quantized_then(by_integers: bool) -> Callable[[int, int], Loaded]:
    """What one writes by hand: x quantized by row, then the library's product, in one compiled function."""

    def load(n: int, k: int) -> Loaded:
        source = random_weight(n, k).float()
        most = 127.0 if by_integers else 448.0
        scale = source.abs().amax(1, keepdim=True) / most
        codes = (source / scale).round().to(torch.int8) if by_integers else (source / scale).to(FP8)

        def run(x: Tensor, w: Tensor, of_w: Tensor) -> Tensor:
            of_x = x.float().abs().amax(1, keepdim=True) / most
            if by_integers:
                rows = (x.float() / of_x).round().to(torch.int8)
                return (torch._int_mm(rows, w.t()).float() * of_x * of_w).to(BF16)
            return torch._scaled_mm(
                (x.float() / of_x).to(FP8), w.t(), of_x, of_w, out_dtype=BF16, use_fast_accum=True
            )

        def prepare(x: Tensor) -> tuple[Any, Tensor]:
            if x.shape[0] > 1:
                torch._dynamo.mark_dynamic(x, 0)
            return x, x.float()

        compiled = torch.compile(run, fullgraph=True)
        decoded = codes.float() * scale
        made = repeated((codes, scale.t().contiguous()), lambda w, x: compiled(x, *w), decoded)
        return Loaded(made.copies, made.nbytes, made.run, decoded, prepare)

    return load


# In the order in which they are measured: those that most formats are compared with come first.
PEERS = {
    "bf16": Peer((ALL,), bf16),
    "tinygemm": Peer(("int4[g128]",), tinygemm, "int4 g128"),
    "humming-uint4": Peer(("int4[g128]",), humming("uint4", GROUP), "uint4 g128"),
    "mslk": Peer(("int4[g128]",), mslk, "int4 g128"),
    "gemlite-uint4": Peer(("int4[g128]",), gemlite_uint4, "uint4 g128"),
    "humming-uint8": Peer(("int8", "float8_e4m3fn"), humming("uint8", 0), "uint8 row"),
    "humming-float8": Peer(("float8_e4m3fn",), humming("float8e4m3", 0), "float8_e4m3 row"),
    "humming-uint3": Peer(("int3[g128]",), humming("uint3", GROUP), "uint3 g128"),
    "humming-uint2": Peer(("int2[g128]",), humming("uint2", GROUP), "uint2 g128"),
    "humming-uint6": Peer(("mxfp6_e3m2",), humming("uint6", GROUP), "uint6 g128"),
    "humming-float6": Peer(("mxfp6_e3m2",), humming("float6e3m2", 32), "float6_e3m2 g32"),
    "humming-float4": Peer(("mxfp4", "nvfp4"), humming("float4e2m1", 32), "float4_e2m1 g32"),
    "gemlite-int8": Peer(("int8",), gemlite_bytes(torch.int8), "int8 row"),
    "gemlite-float8": Peer(("float8_e4m3fn",), gemlite_bytes(FP8), "float8_e4m3 row"),
    "gemlite-mxfp4": Peer(("mxfp4",), gemlite_mxfp4, "mxfp4"),
    "scaled_mm-row": Peer(("fp8 x fp8",), scaled_mm(rows=True), "fp8 x fp8 row", "fp8"),
    "scaled_mm-blocks": Peer(("fp8 x fp8 blocks",), scaled_mm_blocks, "fp8 x fp8 blocks", "fp8"),
    "compiled-fp8": Peer(
        ("fp8 x fp8" + WITH_X,), quantized_then(by_integers=False), "quantize + scaled_mm row", "fp8"
    ),
    "compiled-int8": Peer(
        ("int8 x int8" + WITH_X,), quantized_then(by_integers=True), "quantize + int_mm", "int8"
    ),
    "scaled_mm-tensor": Peer(("fp8 x fp8",), scaled_mm(rows=False), "fp8 x fp8 tensor", "fp8"),
    "int_mm": Peer(("int8 x int8",), int_mm, "int8 x int8", "int8"),
    "humming-uint4-fp8": Peer(
        ("int4 x fp8", "int4 x fp8" + WITH_X), humming("uint4", GROUP, "float8e4m3"), "uint4 x fp8", "fp8"
    ),
    "humming-uint4-int8": Peer(
        ("int4 x int8", "int4 x int8" + WITH_X), humming("uint4", GROUP, "int8"), "uint4 x int8", "int8"
    ),
}
