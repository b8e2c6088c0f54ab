"""The kernel that adds the splits of a context up, in order: the same answer in every run.

In: for each split, head and query the largest score, the sum of the weights under it, and the weighted sum of
the values. Out: source lines of `combine`, one program a head and query.

    y = sum_i 2**(m_i - m) o_i / sum_i 2**(m_i - m) l_i,   m = max m_i
"""

from __future__ import annotations

from ..attention import AttentionSpec
from .lines import TL, Lines

CHUNK = 16  # splits that are added up at a time


def add_combine(out: Lines, spec: AttentionSpec, *, overlap: bool) -> None:
    """Adds the kernel `combine` to a module."""
    dim = 1 << (spec.dim - 1).bit_length()
    keep = f" & (rd < {spec.dim})[None, :]" if dim != spec.dim else ""
    out.add("@triton.jit(do_not_specialize=['rows', 'splits', 't'])")
    with out.indent("def combine(partial, sums, y, rows, splits, t, SPLITS: tl.constexpr):"):
        if overlap:
            out.add("gdc_wait()")
        out.add(
            "pair, r = tl.program_id(0), tl.program_id(1)",
            "start = pair.to(tl.int64) * splits * rows + r",
            f"rd = tl.arange(0, {dim})",
            "rs = tl.arange(0, SPLITS)",
            "have = rs < splits",
            "ms = tl.load(sums + (start + rs * rows) * 2, mask=have, other=float('-inf'))",
            "ls = tl.load(sums + ((start + rs * rows) * 2 + 1), mask=have, other=0.0)",
            "m = tl.max(ms, 0)",
            "base = tl.where(m == float('-inf'), 0.0, m)",
            "l = tl.sum(tl.exp2(ms - base) * ls, 0)",
            f"total = tl.zeros(({dim},), dtype=tl.float32)",
            f"rc = tl.arange(0, {CHUNK})",
        )
        with out.indent(f"for i in range(0, splits, {CHUNK}):"):
            out.add(
                "at = start + (i + rc) * rows",
                "inside = i + rc < splits",
                "mc = tl.load(sums + at * 2, mask=inside, other=float('-inf'))",
                "lc = tl.load(sums + (at * 2 + 1), mask=inside, other=0.0)",
                f"o = tl.load(partial + (at[:, None] * {spec.dim} + rd[None, :]), "
                f"mask=(lc != 0.0)[:, None]{keep}, other=0.0)",
                "total += tl.sum(o * tl.exp2(mc - base)[:, None], 0)",
            )
        out.add("total = tl.where(l == 0.0, 0.0, total / l)")
        mask = f", mask=rd < {spec.dim}" if keep else ""
        kv, group = spec.kv_heads, spec.group
        out.add(
            f"head = pair % {kv} * {group} + r // t",
            f"whole = ((pair // {kv}).to(tl.int64) * t + r % t) * {spec.heads} + head",
            f"tl.store(y + (whole * {spec.dim} + rd), total.to({TL[spec.x]}){mask})",
        )
