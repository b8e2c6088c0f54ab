"""From a `RoundingSpec` to the source of a kernel that rounds in training, forward or backward.

In: a spec. Out: the text of a module with one `kernel`: a program takes a few groups of numbers, finds their
scales or reads them, and writes what they are rounded to, or the gradients, in one pass over memory.

    int4[g32], forward   ->   x = load [128, 32];  s = stored(max |x| / 7.5);  y = clamp(rint(x / s)) * s
    int4[g32], lsq       ->   x, g = load ..;  gx = g where inside;  gs = sum(g * d value / d step)

Bits are those of `format.fake_quantize` and of `formats/estimators/`, where a gradient's lines stand beside
its reference; sums are in another order.
"""

from __future__ import annotations

from ...formats import Float, Format, Integer, format
from ..rounding import RoundingSpec
from .encode import magnitude_lines, read_lines, rounded_lines, scale_lines, zero_lines
from .lines import TL, Lines

INTEGERS = ("count",)


def names(spec: RoundingSpec) -> list[str]:
    """The kernel's arguments."""
    found = ["x"]
    if spec.given:
        found += ["scales", "zeros"] if spec.zero else ["scales"]
    if spec.direction == "forward":
        return [*found, "rounded", "count"]
    return [*found, "gradient", "for_x", *sums_of(spec), "count"]


def sums_of(spec: RoundingSpec) -> list[str]:
    """Of them, the gradients of what is learned."""
    return [f"for_{name}" for name in spec.learned]


def source(spec: RoundingSpec, plain: bool = False) -> str:
    """The kernel's module as text. `plain`: for the interpreter, whose casts to bfloat16 cut bits off."""
    out, fmt = Lines(), format(spec.format)
    out.add(f'"""Rounding: {spec}"""', "import triton", "import triton.language as tl", "")
    out.add('@triton.jit(do_not_specialize=["count"])')
    with out.indent(f"def kernel({', '.join(names(spec))}):"):
        out.add(
            f"r = tl.program_id(0) * {spec.rows} + tl.arange(0, {spec.rows})",
            f"c = tl.arange(0, {spec.wide})",
            f"keep = (r < count)[:, None] & (c < {spec.group})[None, :]",
            f"at = r.to(tl.int64)[:, None] * {spec.group} + c[None, :]",
            "v = tl.load(x + at, mask=keep, other=0.0).to(tl.float32)",
        )
        _scale(out, spec, fmt)
        assert isinstance(fmt.element, Integer | Float)
        out.add(*rounded_lines(fmt.element, fmt.scale, "v", "s", "e", poisoned=not spec.given))
        out.add(*_step(fmt))
        out.add("value = (e - s_z[:, None]) * step[:, None]" if spec.zero else "value = e * step[:, None]")
        if spec.direction == "forward":
            out.add(*_in_lane("value", spec, plain), "tl.store(rounded + at, value, mask=keep)")
        else:
            _gradients(out, spec, fmt, plain)
    return "\n".join(out.text) + "\n"


def _in_lane(name: str, spec: RoundingSpec, plain: bool) -> list[str]:
    """A float32 in the dtype of x; for the interpreter bfloat16 by hand, as bits into the same memory."""
    if spec.lane != "bf16" or not plain:
        return [f"{name} = {name}.to({TL[spec.lane]})"]
    return [
        f"bits = {name}.to(tl.int32, bitcast=True)",
        "bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16",
        f"bits = tl.where({name} != {name}, 0x7FC0, bits).to(tl.int16)",
        f"{name} = bits.to(tl.bfloat16, bitcast=True)",
    ]


def _scale(out: Lines, spec: RoundingSpec, fmt: Format) -> None:
    scale = fmt.scale
    assert scale is not None
    if spec.given:
        # Behind the last group stands a scale that divides.
        fill = "127" if scale.dtype == "e8m0" else "1.0"
        out.add(f"s = tl.load(scales + r, mask=r < count, other={fill})", *read_lines(scale, "s"))
        if spec.zero:
            out.add("s_z = tl.load(zeros + r, mask=r < count, other=0).to(tl.float32)")
    elif spec.zero:
        assert isinstance(fmt.element, Integer)
        out.add(*zero_lines(fmt.element, scale, ["v"], "s"))
    else:
        out.add(*magnitude_lines(["v"], "amax"), *scale_lines(fmt.element, scale, "amax", "s"))


def _step(fmt: Format) -> list[str]:
    """step: the value of the scale; the byte of an e8m0 is the exponent of one, 0 the smallest power."""
    assert fmt.scale is not None
    if fmt.scale.dtype != "e8m0":
        return ["step = s_f"]
    return [
        "step = tl.where(s_e == 0, 0x00400000, s_e << 23).to(tl.int32).to(tl.float32, bitcast=True)",
        "step = tl.where(s_e == 255, float('nan'), step)",
    ]


def _gradients(out: Lines, spec: RoundingSpec, fmt: Format, plain: bool) -> None:
    element = fmt.element
    out.add(
        "g = tl.load(gradient + at, mask=keep, other=0.0).to(tl.float32)",
        "safe = tl.broadcast_to(tl.where(step == 0.0, 1.0, step)[:, None], v.shape)",
    )
    if spec.zero:
        assert isinstance(element, Integer)
        first = float(element.first)
        out.add(
            f"least = (({first!r} - s_z) * step)[:, None]",
            f"u = tl.div_rn(v - least, safe) + {first!r}",
        )
    else:
        out.add("u = tl.div_rn(v, safe)")
    lines = spec.backward
    assert lines is not None
    out.add(*lines.lines, f"back = {lines.for_x}", *_in_lane("back", spec, plain))
    out.add("tl.store(for_x + at, back, mask=keep)")
    for name, each in zip(sums_of(spec), lines.for_held, strict=True):
        out.add(f"tl.store({name} + r, tl.sum(tl.where(keep, {each}, 0.0), 1), mask=r < count)")
