"""From an `AttentionSpec` to the source of the kernel that quantizes new tokens into the cache.

In: a spec. Out: the text of a module with one `kernel`: a program quantizes a few rows of K, or of V, and
puts the codes where the layout has them and the scales beside.

    int8[bf16,halves128], a row of 128   ->   x0, x1 = tl.load(...)               64 numbers each
                                              s = stored(max |x| / 127.5)
                                              unit = c0 << 0 | c1 << 8            64 units of 16 bits

A slice's codes lie in contiguous units, so packing moves no code between threads either.
"""

from __future__ import annotations

from ...formats import Format, Integer
from ..attention import AttentionSpec, group_of, grouped, groups, has_zero, row
from .encode import code_lines, magnitude_lines, read_lines, scale_lines, zero_lines
from .lines import Lines

ROWS = 4  # tokens of a program
ARGUMENTS = (
    "k, v, k_codes, k_scales, k_zeros, v_codes, v_scales, v_zeros, positions, pages, count, tokens, t, "
    "k_b, k_h, k_t, v_b, v_h, v_t, at_b, at_t, p_b"
)
INTEGERS = ("count", "tokens", "t", "k_b", "k_h", "k_t", "v_b", "v_h", "v_t", "at_b", "at_t", "p_b")
LOOSE = ("count", "tokens", "t", "at_b", "at_t", "p_b")


def source(spec: AttentionSpec, *, overlap: bool = False) -> str:
    """The kernel's module as text. overlap: it is launched while the kernel before it still runs."""
    out = Lines()
    out.add(f'"""Cache write of {spec}"""', "import triton", "import triton.language as tl")
    if overlap:
        out.add("from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait")
    out.add("")
    out.add(f"@triton.jit(do_not_specialize={list(LOOSE)!r})")
    with out.indent(f"def kernel({ARGUMENTS}):"):
        heads = spec.kv_heads
        out.add(*["gdc_wait()", "gdc_launch_dependents()"] * overlap)
        out.add(
            f"r = tl.program_id(0) * {ROWS} + tl.arange(0, {ROWS})",
            "here = r < count",
            f"b, h, rt = r // ({heads} * t), r // t % {heads}, r % t",
            "at = tl.load(positions + (b * at_b + rt * at_t), mask=here, other=0).to(tl.int32)",
            "at = tl.where(at < 0, at + tokens, at)",
            # What lies outside is not written.
            "here = here & (at >= 0) & (at < tokens)",
        )
        if spec.page:
            out.add(
                f"page = tl.load(pages + (b.to(tl.int64) * p_b + at // {spec.page}), mask=here, other=0)",
                f"head, at, length = page.to(tl.int64) * {heads} + h, at % {spec.page}, {spec.page}",
            )
        else:
            out.add(f"head, length = b.to(tl.int64) * {heads} + h, tokens")
        out.add("place = head * length + at")
        for number, (which, fmt) in enumerate(spec.formats):
            with out.indent(f"if tl.program_id(1) == {number}:"):
                _side(out, spec, which, fmt)
    return "\n".join(out.text) + "\n"


def _side(out: Lines, spec: AttentionSpec, which: str, fmt: Format) -> None:
    """Quantizes the rows of K or V."""
    walked = row(fmt, spec.dim)
    count, dim = walked.runs * len(walked.slices), spec.dim
    starts = [i * walked.length for i in range(count)]
    out.add(
        f"rd = tl.arange(0, {walked.length})",
        f"row = {which} + (b.to(tl.int64) * {which}_b + h * {which}_h + rt * {which}_t)",
    )
    for i, start in enumerate(starts):
        keep = "here[:, None]" + (
            f" & ({start} + rd[None, :] < {dim})" if start + walked.length > dim else ""
        )
        out.add(
            f"x{i} = tl.load(row[:, None] + ({start} + rd[None, :]), mask={keep}, other=0.0).to(tl.float32)"
        )
    for group in range(groups(fmt, dim)):
        members = [i for i, start in enumerate(starts) if start < dim and group_of(fmt, start) == group]
        _scale(out, spec, which, fmt, group, [f"x{i}" for i in members])
        for i in members:
            out.add(*code_lines(fmt.element, fmt.scale, f"x{i}", "s", f"c{i}"))
            if starts[i] + walked.length > dim:
                out.add(f"c{i} = tl.where(({starts[i]} + rd < {dim})[None, :], c{i}, 0)")
    for i, start in enumerate(starts):
        if start >= dim:
            out.add(f"c{i} = tl.zeros(({ROWS}, {walked.length}), tl.int32)")
    for run in range(walked.runs):
        for load, start in enumerate(walked.loads):
            terms = []
            for i, takes in enumerate(walked.slices):
                code = f"c{run * len(walked.slices) + i}"
                for take in takes:
                    if take.load != load:
                        continue
                    low = f"({code} >> {take.low})" if take.low else code
                    terms.append(f"(({low} & {(1 << take.width) - 1}) << {take.bit})")
            offset = run * walked.units + start
            out.add(
                f"unit = ({' | '.join(terms)}).to(tl.int16)",
                f"tl.store({which}_codes + (place[:, None] * {walked.units * walked.runs} + "
                f"({offset} + rd[None, :])), unit, mask=here[:, None])",
            )


def _scale(out: Lines, spec: AttentionSpec, which: str, fmt: Format, group: int, values: list[str]) -> None:
    """s: the scale of a group, stored beside the codes unless it is static."""
    scale = fmt.scale
    if scale is None:
        return
    if not grouped(fmt):
        out.add(f"s = tl.load({which}_scales + h)", *read_lines(scale, "s"))
        return
    where = f"(head * {groups(fmt, spec.dim)} + {group}) * length + at"
    if has_zero(fmt):
        assert isinstance(fmt.element, Integer)
        out.add(*zero_lines(fmt.element, scale, values, "s"))
        out.add(
            f"tl.store({which}_zeros + ({where}), s_z.to(tl.int32).to({_zero_type(fmt.element)}), mask=here)"
        )
    else:
        out.add(*magnitude_lines(values, "amax"), *scale_lines(fmt.element, scale, "amax", "s"))
    out.add(f"tl.store({which}_scales + ({where}), s, mask=here)")


def _zero_type(element: Integer) -> str:
    return "tl.int8" if element.signed else "tl.uint8"
