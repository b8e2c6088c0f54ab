"""What a kernel of a convolution computes: `ConvSpec`. Its text is all that a graph or a file holds.

In: facts of a region. Out: a value that prints and parses.

    conv 64x32x3x3 s2x2 p1x1 int8[panels16x4t9] x:int8[tensor] bias -> relu(add(y0,e0)) e:f32 y:int8[tensor]
    conv 32x1x3x3 p1x1 g32 int8[panels16x1t9] x:+int8[tensor] -> clamp(y0,0.0,6.0) y:f32 y:int8[tensor]
    conv 1024x784 int8[panels16x4] x:int8[tensor] bias -> relu(y0) y:int8[tensor]

    y = conv(dequantize(x), dequantize(weight)) + bias;  sums of codes are exact, the rest float32

Sizes are those of the weight, [N, K, kh, kw] with K channels of a group; a weight of two is a product [N,
K] of rows of x. `s` strides, `p` padding (four numbers if top, left, bottom and right differ), `d`
dilation, `g` groups. `x:+FORMAT` says that no code of x is negative, which whoever writes the text has to
know. `e:` are the formats of what the epilogue reads, `y:` those of the results, one tensor each; f32 is
plain float32. Without `y:` there is one float32 result.

The inputs of such a kernel, in order: x's codes, scale and, if it has one, zero point; the weight's parts;
the bias (float32 [N]); e0 .., each float32 or codes as x; v0 .. (float32 [N]); scale and zero point of each
result that is codes. An image is padded with its zero point, and sums are of what codes are above it. Images
and results are [.., channels, height, width] by size, and lie with the channels innermost.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from ..formats import Format, Integer, format
from ..formats.panels import Panels
from .epilogue import Epilogue
from .spec import MOST_EXTRAS, CodegenError

LANES = 16
# So many products of a code with a code that is made unsigned fit in 32 bits.
MOST_PRODUCTS = (2**31 - 1) // (255 * 128)
_WORD = re.compile(r"([spdg])(\d+(?:x\d+)*)")
_ONE = "one reads: conv 64x32x3x3 s2x2 p1x1 int8[panels16x4t9] x:int8[tensor] bias -> relu(y0)"


@dataclass(frozen=True)
class ConvInputs:
    """The tensors of one call, told apart. extras: (tensor,) or (codes, scales, [zeros]) each; scales:
    (scales, [zeros]) of each result that is codes."""

    x: tuple[Tensor, ...]
    parts: tuple[Tensor, ...]
    bias: Tensor | None
    extras: tuple[tuple[Tensor, ...], ...]
    vectors: tuple[Tensor, ...]
    scales: tuple[tuple[Tensor, ...], ...]


@dataclass(frozen=True)
class ConvSpec:
    """kernel: (height, width), empty for a product of rows; padding: top, left, bottom, right; positive: no
    code of x is negative; reads, writes: formats of e0 .. and of the results, None for float32."""

    weight: Format
    activation: Format
    n: int
    k: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    bias: bool = False
    positive: bool = False
    epilogue: Epilogue = field(default_factory=Epilogue)
    reads: tuple[Format | None, ...] = ()
    writes: tuple[Format | None, ...] = (None,)

    def __post_init__(self) -> None:
        sizes = (self.n, self.k, *self.kernel, *self.stride, *self.dilation, self.groups)
        if min(sizes) < 1 or min(self.padding) < 0 or len(self.kernel) not in (0, 2):
            raise CodegenError(f"{self} has a size below 1, or too many of them")
        if self.n % self.groups:
            raise CodegenError(f"{self.groups} groups do not divide {self.n} channels")
        if not self.kernel and self != _as_product(self):
            raise CodegenError(
                f"{self} is a product of rows, which has no stride, padding, dilation or groups"
            )
        if self.products > MOST_PRODUCTS:
            raise CodegenError(f"a sum of {self.products} products of 8-bit codes may not fit in 32 bits")
        if self.epilogue.count("y") != 1 or len(self.reads) != self.epilogue.count("e"):
            raise CodegenError(f"{self} does not say a format for each tensor that its epilogue reads")
        if (
            len(self.reads) + self.epilogue.count("v") > MOST_EXTRAS
            or not 0 < len(self.writes) <= MOST_EXTRAS
        ):
            raise CodegenError(f"{self} reads or writes more than {MOST_EXTRAS} tensors, or writes none")
        if self.positive and has_zero(self.activation):
            raise CodegenError(f"{self} says that no code is negative, and codes with a zero point are")
        if self.writes.count(None) > 1:
            raise CodegenError(f"{self} writes one float32 result twice")
        if (why := obstacle(self.weight, self.activation)) is not None:
            raise CodegenError(why)
        for other in (*self.reads, *self.writes):
            if other is not None and not one_scale(other):
                raise CodegenError(f"kernels read and write codes of one scale a tensor, not {other}")
        if self.weight.layout != self.layout:
            raise CodegenError(f"{self} takes its weight in {self.weight.with_layout(self.layout)}")

    def __hash__(self) -> int:
        return hash(str(self))

    @property
    def taps(self) -> int:
        """Places of the kernel."""
        return self.kernel[0] * self.kernel[1] if self.kernel else 1

    @property
    def products(self) -> int:
        """Of each number of the result."""
        return self.taps * self.k

    @property
    def depthwise(self) -> bool:
        """Whether each group is one channel of x."""
        return self.groups > 1 and self.k == 1

    @property
    def of_a_line(self) -> bool:
        """Whether it may be a convolution of one dimension."""
        top, _, bottom, _ = self.padding
        return bool(self.kernel) and (self.kernel[0], self.stride[0], top, bottom, self.dilation[0]) == (
            1,
            1,
            0,
            0,
            1,
        )

    @property
    def layout(self) -> Panels:
        """How the weight lies."""
        return panels(self.n, self.k, self.taps, self.groups)

    @property
    def arity(self) -> int:
        """How many tensors a call takes."""
        read = sum(1 if f is None else len(f.parts) for f in self.reads) + self.epilogue.count("v")
        written = sum(len(f.parts) - 1 for f in self.writes if f is not None)
        return self.weight_at + len(self.weight.parts) + self.bias + read + written

    @property
    def weight_at(self) -> int:
        """Which of a call's tensors is the weight's first."""
        return len(self.activation.parts)

    def inputs(self, given: Sequence[Tensor]) -> ConvInputs:
        """A call's tensors told apart; CodegenError if there are more or fewer."""
        if len(given) != self.arity:
            raise CodegenError(f"the kernel {self} takes {self.arity} tensors, not {len(given)}")
        rest = list(given)

        def take(count: int) -> tuple[Tensor, ...]:
            found = tuple(rest[:count])
            del rest[:count]
            return found

        x = take(self.weight_at)
        parts = take(len(self.weight.parts))
        bias = take(1)[0] if self.bias else None
        extras = tuple(take(1 if f is None else len(f.parts)) for f in self.reads)
        vectors = take(self.epilogue.count("v"))
        scales = tuple(take(len(f.parts) - 1) for f in self.writes if f is not None)
        return ConvInputs(x, parts, bias, extras, vectors, scales)

    def plain(self) -> ConvSpec:
        """The same sums without an epilogue, in float32."""
        return replace(self, epilogue=Epilogue(), reads=(), writes=(None,))

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Of the result, from x's."""
        found = []
        for i, length in enumerate((height, width)):
            padded = length + self.padding[i] + self.padding[i + 2]
            found.append((padded - self.dilation[i] * (self.kernel[i] - 1) - 1) // self.stride[i] + 1)
        return found[0], found[1]

    def __str__(self) -> str:
        words = ["conv", "x".join(map(str, (self.n, self.k, *self.kernel)))]
        top, left, bottom, right = self.padding
        padding = (top, left) if (top, left) == (bottom, right) else self.padding
        for letter, value, plain in (
            ("s", self.stride, (1, 1)),
            ("p", padding, (0, 0)),
            ("d", self.dilation, (1, 1)),
            ("g", (self.groups,), (1,)),
        ):
            words += [letter + "x".join(map(str, value))] if value != plain else []
        words += [str(self.weight), f"x:{'+' * self.positive}{self.activation}", *(["bias"] * self.bias)]
        tail = [f"e:{f or 'f32'}" for f in self.reads]
        tail += [f"y:{f or 'f32'}" for f in self.writes] if self.writes != (None,) else []
        if tail or not self.epilogue.plain:
            words += ["->", str(self.epilogue), *tail]
        return " ".join(words)

    @classmethod
    def parse(cls, text: str) -> ConvSpec:
        """The inverse of `str`; CodegenError if the text says something else."""
        wrong = CodegenError(f"{text!r} is no convolution's text; {_ONE}")
        head, arrow, tail = text.partition(" -> ")
        kind, *words = head.split(" ")
        if kind != "conv" or len(words) < 3 or not re.fullmatch(r"\d+(x\d+)+", words[0]):
            raise wrong
        n, k, *kernel = map(int, words.pop(0).split("x"))
        told: dict[str, tuple[int, ...]] = {"s": (1, 1), "p": (0, 0), "d": (1, 1), "g": (1,)}
        while words and (found := _WORD.fullmatch(words[0])):
            told[found[1]] = tuple(map(int, found[2].split("x")))
            words.pop(0)
        padding = told["p"] * 2 if len(told["p"]) == 2 else told["p"]
        lengths = (len(told["s"]), len(padding), len(told["d"]), len(told["g"]))
        if len(words) not in (2, 3) or not words[1].startswith("x:") or words[2:] not in ([], ["bias"]):
            raise wrong
        if lengths != (2, 4, 2, 1) or (arrow and not tail):
            raise wrong
        root, *ends = tail.split(" ") if arrow else ["y0"]
        reads = tuple(_format(end[2:]) for end in ends if end.startswith("e:"))
        writes = tuple(_format(end[2:]) for end in ends if end.startswith("y:"))
        if len(reads) + len(writes) != len(ends):
            raise wrong
        given = words[1][2:]
        made = cls(
            format(words[0]),
            format(given.removeprefix("+")),
            n,
            k,
            tuple(kernel),
            stride=told["s"],  # type: ignore[arg-type]  # their lengths were looked at
            padding=padding,  # type: ignore[arg-type]
            dilation=told["d"],  # type: ignore[arg-type]
            groups=told["g"][0],
            bias=len(words) == 3,
            positive=given.startswith("+"),
            epilogue=Epilogue.parse(root),
            reads=reads,
            writes=writes or (None,),
        )
        if str(made) != text:
            raise wrong
        return made


def panels(n: int, k: int, taps: int, groups: int) -> Panels:
    """How a weight [n, k * taps] lies: channels four by four, or, depthwise, taps of sixteen channels."""
    if groups > 1 and k == 1:
        return Panels(LANES, 1, taps)
    return Panels(LANES, 4, taps, n // groups if groups > 1 else None)


def obstacle(weight: Format, activation: Format) -> str | None:
    """Why no kernel of a convolution multiplies codes in these formats, or None."""
    if not one_scale(activation):
        return f"kernels of convolutions take x in int8 with one scale a tensor, not in {activation}"
    scale = weight.scale
    if (
        weight.element != Integer(8)
        or scale is None
        or scale.native
        or scale.two_level
        or scale.dtype != "f32"
    ):
        return f"kernels of convolutions take weights in int8 with float32 scales, not in {weight}"
    if scale.zero != "none" or scale.granularity.cols is not None or scale.granularity.rows not in (1, None):
        return f"kernels of convolutions take one scale a row or a tensor, not {weight}"
    return None


def one_scale(f: Format) -> bool:
    """Whether these are bytes of int8 with one scale a tensor in float32, and perhaps a zero point."""
    scale = f.scale
    if f.element != Integer(8) or f.layout.name != "bytes" or scale is None:
        return False
    plain = (
        scale.dtype == "f32" and scale.zero in ("none", "int") and not scale.native and not scale.two_level
    )
    return plain and scale.granularity.rows is None and scale.granularity.cols is None


def has_zero(f: Format | None) -> bool:
    """Whether codes in this format have a zero point; None is float32."""
    return f is not None and f.scale is not None and f.scale.zero != "none"


def _format(text: str) -> Format | None:
    return None if text == "f32" else format(text)


def _as_product(spec: ConvSpec) -> ConvSpec | None:
    plain = (spec.stride, spec.padding, spec.dilation, spec.groups) == ((1, 1), (0, 0, 0, 0), (1, 1), 1)
    return spec if plain else None
