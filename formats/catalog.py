"""The formats that have a name of their own: elements that are tables, and aliases of longer texts.

In: nothing; this is data. Out: ELEMENTS (name -> element), FLOATS (the floats with a definition elsewhere, of
all that can be spelled, -> that) and FORMATS (name -> text, and where it comes from).

    mxfp4  =  float4_e2m1[g32,e8m0]
"""

from __future__ import annotations

from dataclasses import dataclass

from .codebook import Codebook
from .element import Element
from .integer import Integer

# The 16 quantiles of a normal distribution, normalized to [-1, 1], with an exact 0 (QLoRA, arXiv 2305.14314,
# appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# int1 is the sign bit; the mean magnitude is the scale with the least squared error (XNOR-Net, arXiv
# 1603.05279). Code 0 of ternary is 0, so padding decodes to nothing.
ELEMENTS: dict[str, Element] = {
    "nf4": Codebook("nf4", NF4),
    "ternary": Codebook("ternary", (0.0, 1.0, -1.0), rule="absmean"),
    "binary": Codebook("binary", (-1.0, 1.0), rule="absmean"),
    "int1": Codebook("int1", (1.0, -1.0), rule="absmean"),
    "int1_twos": Integer(1),
}

FLOATS = {
    "float8_e4m3fn": "OCP FP8",
    "float8_e5m2": "OCP FP8",
    "float6_e3m2": "OCP MX 1.0",
    "float6_e2m3": "OCP MX 1.0",
    "float4_e2m1": "OCP MX 1.0",
}


@dataclass(frozen=True)
class Alias:
    """`text` is what the name stands for; `source` is where it is defined."""

    text: str
    source: str


_MX = "OCP Microscaling Formats (MX) 1.0"
FORMATS: dict[str, Alias] = {
    "mxfp8": Alias("float8_e4m3fn[g32,e8m0]", _MX),
    "mxfp8_e5m2": Alias("float8_e5m2[g32,e8m0]", _MX),
    "mxfp6_e3m2": Alias("float6_e3m2[g32,e8m0]", _MX),
    "mxfp6_e2m3": Alias("float6_e2m3[g32,e8m0]", _MX),
    "mxfp4": Alias("float4_e2m1[g32,e8m0]", _MX),
    "mxint8": Alias("int8f6[g32,e8m0]", _MX),
    "nvfp4": Alias("float4_e2m1[g16,e4m3,two_level]", "NVIDIA NVFP4"),
    "q4_0": Alias("int4[g32,f16,signed]", "GGUF"),
    "q4_1": Alias("uint4[g32,f16,zero:min]", "GGUF"),
    "q8_0": Alias("int8[g32,f16,narrow]", "GGUF"),
    "tinygemm": Alias("uint4[g128,bf16,zero:float]", "PyTorch int4 matmul"),
}
