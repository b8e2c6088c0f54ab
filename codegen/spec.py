"""What a fused kernel computes: `GemmSpec`. Its text is all that a graph, a file or a tuning table holds.

In: facts of a region. Out: a value that prints and parses.

    GemmSpec(format("int4[g128,halves256]"), n=4096, k=4096, x="bf16", bias=True)
    linear 4096x4096 bf16 int4[g128,halves256] bias

    y [M, n] = x [M, k] @ dequantize(parts) [n, k].T (+ bias [n]), sums in float32, rounded once

More words say more:

    linear 14336x4096 bf16 2*int4[g128,halves256] -> mul(silu(y0),y1)     two weights, an epilogue
    linear 4096x4096 bf16 int8[bytes] x:int8                              x comes as codes and scales
    grouped 8 4096x4096 bf16 int4[g128,halves256]                         8 experts, x's rows sorted by expert

The inputs of such a kernel, in order: x; x's scales if it comes quantized; the last row of each expert, plus
one (int32 [experts]); each weight's parts; each weight's bias; what the epilogue reads, e0 .. then v0 ...
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..formats import BitfoldError, Float, Format, Integer, format
from .epilogue import Epilogue
from .lanes import LANE_TYPES
from .slices import BYTE, Unwalkable, Walk, walk

# Elements that tensor cores multiply as they are, and the name that Triton's lanes go by.
NATIVE: dict[Integer | Float, str] = {Integer(8): "int8", Float(4, 3, "fn"): "e4m3"}
# Activations and results: float32 is for CPUs, whose kernels compute in it.
TYPES = {**LANE_TYPES, "f32": torch.float32}
MOST_WEIGHTS = 4
MOST_EXTRAS = (
    8  # tensors that an epilogue reads, and that one writes; kExtras, kReads and kWrites in cpp/headers
)
_KIND = re.compile(r"linear|grouped (\d+)")
_ONE = "one reads: linear 4096x4096 bf16 int8 bias"


def type_name(dtype: torch.dtype) -> str | None:
    """What specs call a floating dtype; None if they do not."""
    return next((name for name, one in TYPES.items() if one == dtype), None)


class CodegenError(BitfoldError):
    """A kernel cannot be generated, or not for these tensors."""


@dataclass(frozen=True)
class Inputs:
    """The tensors of one call, told apart. parts and biases: one entry a weight."""

    x: Tensor
    x_scales: Tensor | None
    ends: Tensor | None
    parts: tuple[tuple[Tensor, ...], ...]
    biases: tuple[Tensor, ...]
    extras: tuple[Tensor, ...]


@dataclass(frozen=True)
class GemmSpec:
    """weight [n, k] in a format, its layout included; x: the dtype of the result, bf16, f16 or (on CPUs) f32,
    and of x unless `activation` says in which codes x comes; bias [n] in that dtype; weights: how many of the
    kind x is multiplied with; experts: 0, or how many weights [n, k] lie behind one another, each for its own
    rows.
    """

    weight: Format
    n: int
    k: int
    x: str = "bf16"
    bias: bool = False
    activation: Format | None = None
    weights: int = 1
    epilogue: Epilogue = field(default_factory=Epilogue)
    experts: int = 0

    def __post_init__(self) -> None:
        if self.x not in TYPES:
            raise CodegenError(f"fused kernels take activations in {' or '.join(TYPES)}, not {self.x!r}")
        if self.n < 1 or self.k < 1:
            raise CodegenError(f"a weight of shape [{self.n}, {self.k}] has nothing to multiply")
        if self.n * self.k >= 2**31:
            raise CodegenError(
                f"a weight of shape [{self.n}, {self.k}] has 2**31 elements or more, past 32-bit addresses; "
                "split it along its rows"
            )
        if not 1 <= self.weights <= MOST_WEIGHTS:
            raise CodegenError(f"a kernel multiplies x with 1 to {MOST_WEIGHTS} weights, not {self.weights}")
        if self.epilogue.count("y") > self.weights or (self.weights > 1 and self.epilogue.plain):
            raise CodegenError(
                f"the epilogue {self.epilogue} reads {self.epilogue.count('y')} sums of {self.weights} "
                "weights"
            )
        if (extras := self.epilogue.count("e") + self.epilogue.count("v")) > MOST_EXTRAS:
            raise CodegenError(
                f"an epilogue reads at most {MOST_EXTRAS} tensors beside its sums, not {extras}"
            )
        if self.experts and (self.bias or self.epilogue.count("v")):
            raise CodegenError("experts have no bias and no numbers a column of their own; add them after")
        self.weight.check((self.n, self.k))
        if self.activation is not None:
            self._check_activation(self.activation)

    def _check_activation(self, given: Format) -> None:
        scale = given.scale
        if given.element not in NATIVE or given.layout.name != "bytes":
            raise CodegenError(f"tensor cores multiply int8 and float8_e4m3fn, not activations in {given}")
        if scale is None or scale.zero != "none" or scale.native or scale.two_level:
            raise CodegenError(f"activations in {given} have no scale, or more than one, for a kernel to use")
        if scale.granularity.rows not in (1, None) or (
            scale.granularity.rows is None and scale.granularity.cols
        ):
            raise CodegenError(f"activations have a scale a tensor, a token or a block of one, not {given}")
        given.check((1, self.k))

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # Kept: each call of a kernel looks its schedule up by the spec. The same in every process, since what
        # is kept travels with a pickled spec.
        return int.from_bytes(hashlib.sha256(str(self).encode()).digest()[:8], "little")

    @property
    def dtype(self) -> torch.dtype:
        """Of the result, unless the epilogue says another, and of x where it is not quantized."""
        return TYPES[self.x]

    @property
    def out(self) -> torch.dtype:
        """Of the result."""
        return self.epilogue.out or self.dtype

    @property
    def lane(self) -> str:
        """What the tensor cores multiply: bf16, f16, int8 or e4m3."""
        if self.activation is None:
            return self.x
        element = self.activation.element
        assert isinstance(element, Integer | Float)
        return NATIVE[element]

    @cached_property
    def walk(self) -> Walk | Unwalkable:
        """How a kernel walks over a row: in units as wide as the lane. Bytes are cut to the groups."""
        if self.activation is None:
            return walk(self.weight, self.k)
        return walk(self.weight, self.k, BYTE, math.gcd(*self.groups))

    @property
    def groups(self) -> list[int]:
        """Numbers of a row that share a scale, of the weight and of x, where it is not the whole row."""
        held = [self.weight] + ([] if self.activation is None else [self.activation])
        return [f.cols for f in held if f.cols is not None]

    @property
    def has_offset(self) -> bool:
        """Whether something is added to scaled values: a zero point, or the middle of unsigned bytes."""
        scale, element = self.weight.scale, self.weight.element
        unsigned = self.lane == "int8" and not getattr(element, "signed", True)
        return unsigned or (scale is not None and scale.zero != "none")

    @property
    def arity(self) -> int:
        """How many tensors a call takes."""
        extras = self.epilogue.count("e") + self.epilogue.count("v")
        each = len(self.weight.parts) + int(self.bias)
        return 1 + (self.activation is not None) + bool(self.experts) + self.weights * each + extras

    def inputs(self, given: Sequence[Tensor]) -> Inputs:
        """A call's tensors told apart; CodegenError if there are more or fewer."""
        if len(given) != self.arity:
            raise CodegenError(f"the kernel {self} takes {self.arity} tensors, not {len(given)}")
        rest = list(given)
        x = rest.pop(0)
        x_scales = rest.pop(0) if self.activation is not None else None
        ends = rest.pop(0) if self.experts else None
        count = len(self.weight.parts)
        parts = [tuple(rest[i * count : (i + 1) * count]) for i in range(self.weights)]
        rest = rest[self.weights * count :]
        biases = self.weights * int(self.bias)
        return Inputs(x, x_scales, ends, tuple(parts), tuple(rest[:biases]), tuple(rest[biases:]))

    def __str__(self) -> str:
        kind = f"grouped {self.experts}" if self.experts else "linear"
        many = f"{self.weights}*" if self.weights > 1 else ""
        words = [kind, f"{self.n}x{self.k}", self.x, f"{many}{self.weight}"]
        words += [f"x:{self.activation}"] if self.activation is not None else []
        words += ["bias"] if self.bias else []
        words += ["->", str(self.epilogue)] if not self.epilogue.plain else []
        return " ".join(words)

    @classmethod
    def parse(cls, text: str) -> GemmSpec:
        """The inverse of `str`; CodegenError if the text says something else."""
        head, arrow, tail = text.partition(" -> ")
        kind = _KIND.match(head)
        words = head[kind.end() :].split(" ") if kind is not None else []
        if kind is None or len(words) < 4 or words[0] or (arrow and not tail):
            raise CodegenError(f"{text!r} is no kernel's text; {_ONE}")
        _, size, x, weight, *more = words
        rows, _, cols = size.partition("x")
        activation = more.pop(0)[2:] if more and more[0].startswith("x:") else None
        if not rows.isdecimal() or not cols.isdecimal() or more not in ([], ["bias"]):
            raise CodegenError(f"{text!r} is no kernel's text; {_ONE}")
        many, star, name = weight.partition("*")
        if star and not many.isdecimal():
            raise CodegenError(f"{text!r} is no kernel's text; {_ONE}")
        return cls(
            format(name if star else weight),
            int(rows),
            int(cols),
            x,
            bias=bool(more),
            activation=None if activation is None else format(activation),
            weights=int(many) if star else 1,
            epilogue=Epilogue.parse(tail) if arrow else Epilogue(),
            experts=int(kind.group(1) or 0),
        )
