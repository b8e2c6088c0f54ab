"""Numbers, scales, layouts, sparsity: all that is known of how a tensor is stored, said once.

A format is an element (what the bits of one number mean), a scale (how many numbers share it, how it is
chosen and stored), a layout (where the bits lie) and a sparsity (what is stored at all). It has a text form.

    f = format("int4[g128]")        Format; also "mxfp4", "float8_e4m3fn[row]", "uint4[g32,f16,zero:min]"
    q = f.quantize(w)               Quantized: q.codes, q.scales, q.zeros, q.parts, q.nbytes
    w2 = f.dequantize(q)
    register("trits", Codebook("trits", (0.0, 1.0, -1.0)))      parses, packs, saves and traces from then on

Importing the package registers the operators `torch.ops.bitfold.{quantize, dequantize, fake_quantize, pack,
unpack, choose}`. Errors of use are `FormatError`, a `BitfoldError`, a `ValueError`.
"""

from . import hadamard, norm, ops, round_groups, train_quantize
from .codebook import Codebook
from .element import Element
from .errors import BitfoldError, FormatError, nearest
from .floating import Float
from .format import Format, Quantized
from .granularity import Granularity
from .integer import Integer
from .layout import Bytes, Layout, Packed, Planar
from .mover import Field
from .registry import register
from .rules import RULES
from .scale import Scale
from .sparsity import Dense, NofM, Sparsity
from .table import Row, describe
from .text import format, layout_named

__all__ = [
    "RULES",
    "BitfoldError",
    "Bytes",
    "Codebook",
    "Dense",
    "Element",
    "Field",
    "Float",
    "Format",
    "FormatError",
    "Granularity",
    "Integer",
    "Layout",
    "NofM",
    "Packed",
    "Planar",
    "Quantized",
    "Row",
    "Scale",
    "Sparsity",
    "describe",
    "format",
    "hadamard",
    "layout_named",
    "nearest",
    "norm",
    "ops",
    "register",
    "round_groups",
    "train_quantize",
]
