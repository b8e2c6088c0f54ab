"""What a kernel does to its sums before it writes them: an expression that prints, parses, runs in torch.

In: text, or nodes put together by `lowering/splice.py`. Out: an `Epilogue`, which a `GemmSpec` carries.

    mul(silu(y0),y1)     gate and up projections in one kernel: y0 and y1 are the sums of two weights
    add(y0,e0)           a residual; e0 [M, n] is an input of its own
    mul(relu(y0),v0)     v0 [n], one number for each column
    f32(y0)              the result is float32

Everything is computed in float32 and rounded once, to the result's dtype, where the operators of the graph
round after each step: a fused result is the closer one of the two.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..formats import BitfoldError

_LEAF = re.compile(r"[yev]\d+")
_TOKEN = re.compile(r"\s*([a-z]\w*|-?inf|-?\d[\d.e+-]*|[(),])")
# tanh by its series where 1 - exp(-2x) would cancel: past this the other form is exact to 1e-6.
_SMALL = 0.05


@dataclass(frozen=True)
class Op:
    """count: operands; run: on float32 tensors; triton, cpp: the same as an expression of {0}, {1}, .."""

    count: int
    run: Callable[..., Tensor]
    triton: str
    cpp: str


def _rounded(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: x.to(dtype).to(torch.float32)


# Comparisons are written so that NaN takes the branch that keeps it.
OPS: dict[str, Op] = {
    "add": Op(2, torch.add, "({0} + {1})", "({0} + {1})"),
    "sub": Op(2, torch.sub, "({0} - {1})", "({0} - {1})"),
    "mul": Op(2, torch.mul, "({0} * {1})", "({0} * {1})"),
    "div": Op(2, torch.div, "({0} / {1})", "({0} / {1})"),
    "neg": Op(1, torch.neg, "(-{0})", "(-{0})"),
    "relu": Op(1, torch.relu, "tl.where({0} < 0.0, 0.0, {0})", "({0} < 0.0f ? 0.0f : {0})"),
    "sigmoid": Op(1, torch.sigmoid, "(1.0 / (1.0 + tl.exp(-{0})))", "(1.0f / (1.0f + exponential(-{0})))"),
    "silu": Op(
        1,
        torch.nn.functional.silu,
        "({0} / (1.0 + tl.exp(-{0})))",
        "({0} / (1.0f + exponential(-{0})))",
    ),
    "tanh": Op(1, torch.tanh, "hyperbolic_tangent({0})", "hyperbolic_tangent({0})"),
    "gelu": Op(
        1,
        torch.nn.functional.gelu,
        f"(0.5 * {{0}} * (1.0 + tl.erf({{0}} * {math.sqrt(0.5)!r})))",
        f"(0.5f * {{0}} * (1.0f + std::erf({{0}} * {math.sqrt(0.5)!r}f)))",
    ),
    "gelu_tanh": Op(
        1,
        lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        "(0.5 * {0} * (1.0 + hyperbolic_tangent(0.7978845608028654 * ({0} + 0.044715 * {0} * {0} * {0}))))",
        "(0.5f * {0} * (1.0f + hyperbolic_tangent(0.7978845608f * ({0} + 0.044715f * {0} * {0} * {0}))))",
    ),
    "hardswish": Op(
        1,
        torch.nn.functional.hardswish,
        "({0} * tl.where({0} < -3.0, 0.0, tl.where({0} > 3.0, 6.0, {0} + 3.0)) / 6.0)",
        "({0} * ({0} < -3.0f ? 0.0f : {0} > 3.0f ? 6.0f : {0} + 3.0f) / 6.0f)",
    ),
    "leaky_relu": Op(
        2,
        lambda x, s: torch.where(x < 0, x * s, x),
        "tl.where({0} < 0.0, {0} * {1}, {0})",
        "({0} < 0.0f ? {0} * {1} : {0})",
    ),
    "clamp": Op(
        3,
        lambda x, a, b: torch.clamp(x, a, b),
        "tl.where(tl.where({0} < {1}, {1}, {0}) > {2}, {2}, tl.where({0} < {1}, {1}, {0}))",
        "(({0} < {1} ? {1} : {0}) > {2} ? {2} : ({0} < {1} ? {1} : {0}))",
    ),
    "bf16": Op(1, _rounded(torch.bfloat16), "{0}.to(tl.bfloat16).to(tl.float32)", "rounded<bf16>({0})"),
    "f16": Op(1, _rounded(torch.float16), "{0}.to(tl.float16).to(tl.float32)", "rounded<f16>({0})"),
    "f32": Op(1, lambda x: x, "{0}", "{0}"),
}

TANGENT = f"""
@triton.jit
def hyperbolic_tangent(x):
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0)))
    falling = tl.exp(-2.0 * tl.abs(x))
    whole = (1.0 - falling) / (1.0 + falling)
    return tl.where(tl.abs(x) < {_SMALL}, series, tl.where(x < 0.0, -whole, whole))
"""


@dataclass(frozen=True)
class Apply:
    """One operation on its operands."""

    op: str
    operands: tuple[Apply | str | float, ...]

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise BitfoldError(f"an epilogue computes {', '.join(OPS)}, not {self.op!r}")
        if len(self.operands) != OPS[self.op].count:
            raise BitfoldError(f"{self.op} in an epilogue takes {OPS[self.op].count} operands")

    def __str__(self) -> str:
        return f"{self.op}({','.join(map(_text, self.operands))})"


Expression = Apply | str | float


@dataclass(frozen=True)
class Epilogue:
    """root: y0, y1 .. stand for the sums of the weights, e0 .. for inputs [M, n], v0 .. for inputs [n]."""

    root: Expression = "y0"

    def __post_init__(self) -> None:
        for leaf in _leaves(self.root):
            if isinstance(leaf, str) and not _LEAF.fullmatch(leaf):
                raise BitfoldError(f"an epilogue reads y0, e0, v0 and the like, not {leaf!r}")
        for kind in "yev":
            wanted = [f"{kind}{i}" for i in range(self.count(kind))]
            if missing := [name for name in wanted if name not in self.names]:
                raise BitfoldError(f"the epilogue {self} reads {wanted[-1]} and not {missing[0]}")
        if "y0" not in self.names:
            raise BitfoldError(f"the epilogue {self} does not read the sums, y0")

    @cached_property
    def names(self) -> frozenset[str]:
        """Leaves that are tensors."""
        return frozenset(leaf for leaf in _leaves(self.root) if isinstance(leaf, str))

    def count(self, kind: str) -> int:
        """How many tensors of a kind (y, e or v) it reads."""
        return max((int(name[1:]) + 1 for name in self.names if name[0] == kind), default=0)

    @property
    def plain(self) -> bool:
        """Whether the sums are written as they are."""
        return self.root == "y0"

    @property
    def out(self) -> torch.dtype | None:
        """The result's dtype if the epilogue says one."""
        casts = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
        return casts.get(self.root.op) if isinstance(self.root, Apply) else None

    def run(self, given: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """The reference: in `dtype` [M, n] from tensors by name, each brought to it first."""
        held = {name: tensor.to(dtype) for name, tensor in given.items()}

        def value(of: Expression) -> Tensor | float:
            if isinstance(of, Apply):
                return OPS[of.op].run(*(value(operand) for operand in of.operands))
            return held[of] if isinstance(of, str) else of

        found = value(self.root)
        assert isinstance(found, Tensor)
        return found

    def triton(self, names: Mapping[str, str]) -> tuple[list[str], str]:
        """(lines that assign each step once, the name of the result); `names`: what the leaves are called."""
        return self._steps(names, lambda op: op.triton, _number, "{0} = {1}")

    def cpp(self, names: Mapping[str, str]) -> tuple[list[str], str]:
        """The same in C++."""
        return self._steps(names, lambda op: op.cpp, _float, "const float {0} = {1};")

    def _steps(
        self,
        names: Mapping[str, str],
        template: Callable[[Op], str],
        number: Callable[[float], str],
        assign: str,
    ) -> tuple[list[str], str]:
        lines: list[str] = []
        made: dict[Apply, str] = {}

        def value(of: Expression) -> str:
            if isinstance(of, str):
                return names[of]
            if isinstance(of, float):
                return number(of)
            if of not in made:
                text = template(OPS[of.op]).format(*(value(operand) for operand in of.operands))
                made[of] = f"r{len(lines)}"
                lines.append(assign.format(made[of], text))
            return made[of]

        return lines, value(self.root)

    @property
    def functions(self) -> str:
        """Source of the functions that its lines call."""
        return TANGENT if any(op in str(self) for op in ("tanh",)) else ""

    def __str__(self) -> str:
        return _text(self.root)

    @classmethod
    def parse(cls, text: str) -> Epilogue:
        """The inverse of `str`; BitfoldError if the text is no expression."""
        tokens = _tokens(text)
        root = _expression(tokens, text)
        if tokens:
            raise BitfoldError(f"{text!r} goes on after its expression, at {tokens[0]!r}")
        return cls(root)


def _leaves(of: Expression) -> Iterator[str | float]:
    if isinstance(of, Apply):
        for operand in of.operands:
            yield from _leaves(operand)
    else:
        yield of


def _text(of: Expression) -> str:
    return repr(of) if isinstance(of, float) else str(of)


def _number(of: float) -> str:
    return repr(of) if math.isfinite(of) else f"float('{of}')"


def _float(of: float) -> str:
    if math.isfinite(of):
        return f"({of!r}f)"
    return "NAN" if of != of else ("INFINITY" if of > 0 else "-INFINITY")


def _tokens(text: str) -> list[str]:
    found, at = [], 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise BitfoldError(f"{text!r} is no epilogue from {text[at:]!r} on; one reads: mul(silu(y0),y1)")
        found.append(match.group(1))
        at = match.end()
    return found


def _expression(tokens: list[str], text: str) -> Expression:
    token = tokens.pop(0) if tokens else ""
    if token in OPS and tokens[:1] == ["("]:
        operands = []
        while tokens and tokens.pop(0) in "(,":
            operands.append(_expression(tokens, text))
            if tokens[:1] == [")"]:
                tokens.pop(0)
                return Apply(token, tuple(operands))
    elif _LEAF.fullmatch(token):
        return token
    else:
        try:
            return float(token)
        except ValueError:
            pass
    raise BitfoldError(f"{text!r} is no epilogue at {token!r}; one reads: mul(silu(y0),y1)")
