"""From an `AttentionSpec` to the source of its decode kernels in Triton: one pass over a split of the
context, and the combination of the splits.

In: a spec and a schedule. Out: the text of a module with `kernel` and `combine`; no format is named in it.

    attention 32/8x128 bf16 int8[halves128] int8[halves128], "b64 w4 s3"
    ->  for start in tl.range(first, last, 64):              64 tokens of one head of the cache
            u0 = tl.load(k_codes + ...)                       [64, 64] 16-bit units
            s = tl.dot(<decode>(u0), q0); s = tl.dot(<decode>(u0), q1, s)      scores, [64, rows of q]
            w = exp2(s * ks[:, None] - m) * vs[:, None]       probabilities times the scales of V
            o0 = tl.dot(<decode>(v0), w, o0 * alpha)          [64 numbers of V, rows of q]

Codes are the first operand of both products: they come from registers, so decoded values never pass through
shared memory, and no code moves from one thread to another. Everything is therefore transposed: scores are
[tokens, rows], the output is [numbers, rows]. A scale for each token multiplies a row of the scores or of the
probabilities, never a value. Rows are the queries of all heads that share a head of the cache: r = g * T + t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..attention import AttentionSpec, group_of, grouped, groups, has_zero, row
from ..attention_schedule import AttentionSchedule
from .attention_combine import add_combine
from .attention_side import Side
from .lines import TL, Lines
from .values import needs_table

ARGUMENTS = (
    "q, k_codes, k_scales, k_zeros, k_table, v_codes, v_scales, v_zeros, v_table, limits, mask, pages, y, "
    "partial, sums, tokens, t, splits, q_b, q_h, q_t, l_b, l_t, m_b, m_h, m_t, p_b"
)
INTEGERS = ("tokens", "t", "splits", "q_b", "q_h", "q_t", "l_b", "l_t", "m_b", "m_h", "m_t", "p_b")
# Sizes that change from call to call must not compile anew. Strides of q are left to be specialized: that
# they are multiples of 16 is what wide loads need.
LOOSE = ("tokens", "t", "splits", "l_b", "l_t", "m_b", "m_h", "m_t", "p_b")


@dataclass(frozen=True)
class Kernel:
    """The kernels being printed. `plain`: decode in Triton's own words, for the interpreter."""

    spec: AttentionSpec
    schedule: AttentionSchedule
    plain: bool = False

    @property
    def k(self) -> Side:
        return Side("k", self.spec.k, row(self.spec.k, self.spec.dim), self.spec.x, self.plain)

    @property
    def v(self) -> Side:
        return Side("v", self.spec.v, row(self.spec.v, self.spec.dim), self.spec.v_lane, self.plain)

    def source(self) -> str:
        out = Lines()
        out.add(f'"""{self.spec}', "", f'{self.schedule}{", plain" if self.plain else ""}"""')
        out.add("import triton", "import triton.language as tl")
        if self.overlap:
            out.add("from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait")
        out.add("", *self.k.constants(), *self.v.constants(), "")
        if "e8m0" in {side.format.scale.dtype for side in (self.k, self.v) if side.format.scale is not None}:
            self._e8m0(out)
        out.add(f"@triton.jit(do_not_specialize={list(LOOSE)!r})")
        with out.indent(f"def kernel({ARGUMENTS}):"):
            self._head(out)
            self._loop(out)
            self._tail(out)
        out.add("")
        add_combine(out, self.spec, overlap=self.overlap)
        return "\n".join(out.text) + "\n"

    @property
    def overlap(self) -> bool:
        return self.schedule.overlap and not self.plain

    @staticmethod
    def _e8m0(out: Lines) -> None:
        out.add("@triton.jit")
        with out.indent("def e8m0(byte):"):
            out.add(
                "code = byte.to(tl.int32)",
                "bits = tl.where(code == 0, 0x00400000, code << 23)",
                "return tl.where(code == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)",
            )
        out.add("")

    def _head(self, out: Lines) -> None:
        spec, s = self.spec, self.schedule
        # A split has whole blocks, so that all but the last end where a block does.
        out.add(
            "pair, part, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)",
            f"b, h = pair // {spec.kv_heads}, pair % {spec.kv_heads}",
            f"rows = t * {spec.group}",
            f"rm = block * {s.rows} + tl.arange(0, {s.rows})",
            "here = rm < rows",
            "g, rt = rm // t, rm % t",
            "limit = tl.load(limits + (b * l_b + rt * l_t), mask=here, other=0).to(tl.int32)",
            "limit = tl.minimum(limit, tokens)",
            "length = tl.max(limit, 0)",
            f"each = tl.cdiv(tl.cdiv(length, {s.block}), splits) * {s.block}",
            "first = part * each",
            "last = tl.minimum(first + each, length)",
            f"rn = tl.arange(0, {s.block})",
        )
        for side in (self.k, self.v):
            units = side.walk.units * side.walk.runs
            out.add(f"{side.name}r = tl.arange(0, {side.walk.length})")
            if spec.page:
                out.add(f"{side.name}u = {side.name}_codes + h * {units * spec.page}")
            else:
                out.add(f"{side.name}u = {side.name}_codes + pair.to(tl.int64) * tokens * {units}")
            self._pointers_of_scales(out, side)
        if spec.page:
            out.add("table = pages + b.to(tl.int64) * p_b")
        if spec.mask != "none":
            out.add(f"shown = mask + b.to(tl.int64) * m_b + (h * {spec.group} + g) * m_h + rt * m_t")
        out.add(f"qs = q + b.to(tl.int64) * q_b + (h * {spec.group} + g)[None, :] * q_h + rt[None, :] * q_t")
        for index in range(len(self.k.slices)):
            start = self.k.start(index)
            short = start + self.k.walk.length > spec.dim
            keep = f"here[None, :] & ({start} + kr[:, None] < {spec.dim})" if short else "here[None, :]"
            out.add(f"q{index} = tl.load(qs + ({start} + kr[:, None]), mask={keep}, other=0.0)")
        if has_zero(spec.k):
            for group in range(groups(spec.k, spec.dim)):
                terms = [f"tl.sum(q{i}.to(tl.float32), 0)" for i in self._slices_of(self.k, group)]
                out.add(f"qz{group} = {' + '.join(terms)}")
        out.add(
            f"m = tl.full(({s.rows},), float('-inf'), dtype=tl.float32)",
            # Summed over a block's tokens at the end: a sum across warps a block costs a barrier.
            f"lt = tl.zeros(({s.block}, {s.rows}), dtype=tl.float32)",
        )
        for index in range(len(self.v.slices)):
            out.add(f"o{index} = tl.zeros(({self.v.walk.length}, {s.rows}), dtype=tl.float32)")
        if has_zero(spec.v):
            out.add(
                *(f"oz{g} = tl.zeros(({s.rows},), dtype=tl.float32)" for g in range(groups(spec.v, spec.dim)))
            )
        static = f" * {self._static('k')}" if self._is_static(self.k) else ""
        out.add(f"factor = {spec.softmax_scale * math.log2(math.e)!r}{static}")
        if self.overlap:
            out.add("gdc_launch_dependents()")
        out.add(*self._ahead("first", ""))

    def _pointers_of_scales(self, out: Lines, side: Side) -> None:
        spec = self.spec
        count = groups(side.format, spec.dim)
        if not grouped(side.format):
            return
        for kind in ("scales", "zeros")[: 2 if has_zero(side.format) else 1]:
            short = f"{side.name}{kind[0]}"
            if spec.page:
                out.add(f"{short} = {side.name}_{kind} + h * {count * spec.page}")
            else:
                out.add(f"{short} = {side.name}_{kind} + pair.to(tl.int64) * tokens * {count}")

    @staticmethod
    def _is_static(side: Side) -> bool:
        return side.format.scale is not None and not grouped(side.format)

    def _static(self, name: str) -> str:
        fmt = self.spec.k if name == "k" else self.spec.v
        assert fmt.scale is not None
        load = f"tl.load({name}_scales + h)"
        return f"e8m0({load})" if fmt.scale.dtype == "e8m0" else f"{load}.to(tl.float32)"

    def _slices_of(self, side: Side, group: int) -> list[int]:
        """Slices of a group that hold numbers; what is behind the last number is in none."""
        starts = {i: side.start(i) for i in range(len(side.slices))}
        return [i for i, at in starts.items() if at < self.spec.dim and group_of(side.format, at) == group]

    def _token(self, start: str, prefix: str) -> list[str]:
        """`at`: the tokens of a block, the last one for those behind it, which are never read."""
        spec = self.spec
        lines = [f"{prefix}at = tl.maximum(tl.minimum({start} + rn, length - 1), 0)"]
        if spec.page:
            held, page = f"{prefix}held", f"{prefix}page"
            if spec.page >= self.schedule.block:
                begins = f"tl.maximum(tl.minimum({start}, length - 1), 0)"
                lines.append(
                    f"{page} = tl.load(table + {begins} // {spec.page}, mask=length > 0, other=0)"
                    ".to(tl.int64)"
                )
                lines.append(f"{held} = {prefix}at % {spec.page}")
                return lines
            lines.append(
                f"{page} = tl.load(table + {prefix}at // {spec.page}, mask={prefix}at < length, other=0)"
                ".to(tl.int64)"
            )
            lines.append(f"{held} = {prefix}at % {spec.page}")
        return lines

    def _place(self, prefix: str, each: int, page_axis: str = "") -> str:
        """Offset of a token's row of `each` things, with `page_axis` as its index suffix."""
        spec = self.spec
        if not spec.page:
            return f"{prefix}at{page_axis} * {each}"
        page = f"{prefix}page" if spec.page >= self.schedule.block else f"{prefix}page{page_axis}"
        return f"({page} * {spec.kv_heads * spec.page * each} + {prefix}held{page_axis} * {each})"

    def _place_of_scale(self, prefix: str, group: int, count: int) -> str:
        """Offset of a token's scale: those of neighbouring tokens lie side by side."""
        spec = self.spec
        if not spec.page:
            return f"{group} * tokens + {prefix}at" if group else f"{prefix}at"
        return f"{prefix}page * {spec.kv_heads * spec.page * count} + ({group * spec.page} + {prefix}held)"

    def _ahead(self, start: str, prefix: str) -> list[str]:
        """Scales, zero points and the mask of a block of tokens. Only loads that feed a dot are pipelined by
        the compiler, so these are fetched a block ahead by hand."""
        spec = self.spec
        wanted = [side for side in (self.k, self.v) if grouped(side.format)]
        if not wanted and spec.mask == "none":
            return []
        lines = self._token(start, prefix)
        for side in wanted:
            fmt = side.format
            assert fmt.scale is not None
            count = groups(fmt, spec.dim)
            for group in range(count):
                place = self._place_of_scale(prefix, group, count)
                load = f"tl.load({side.name}s + ({place}))"
                lines.append(f"{prefix}{side.name}s{group} = {load}")
                if has_zero(fmt):
                    lines.append(f"{prefix}{side.name}z{group} = tl.load({side.name}z + ({place}))")
        if spec.mask != "none":
            lines.append(
                f"{prefix}mk = tl.load(shown[None, :] + {prefix}at[:, None], mask=here[None, :], other=0)"
            )
        return lines

    def _carried(self) -> list[str]:
        names = []
        for side in (self.k, self.v):
            if grouped(side.format):
                kinds = "sz" if has_zero(side.format) else "s"
                names += [
                    f"{side.name}{c}{g}" for g in range(groups(side.format, self.spec.dim)) for c in kinds
                ]
        return names + (["mk"] if self.spec.mask != "none" else [])

    def _number(self, side: Side, group: int) -> str:
        assert side.format.scale is not None
        name = f"{side.name}s{group}"
        return f"e8m0({name})" if side.format.scale.dtype == "e8m0" else f"{name}.to(tl.float32)"

    def _dot(self, a: str, b: str, onto: str = "") -> str:
        if self.plain:
            given = f"{a}.to(tl.float32), {b}.to(tl.float32)"
            return f"tl.dot({given}, {onto + ', ' if onto else ''}input_precision='ieee')"
        return f"tl.dot({a}, {b}, {onto})" if onto else f"tl.dot({a}, {b})"

    def _loop(self, out: Lines) -> None:
        s = self.schedule
        with out.indent(f"for start in tl.range(first, last, {s.block}, num_stages={s.stages}):"):
            out.add(*self._token("start", "c_"))
            for run in range(self.k.walk.runs):
                out.add(*self._units(self.k, run, "[:, None]", "[None, :]"))
            for run in range(self.v.walk.runs):
                out.add(*self._units(self.v, run, "[None, :]", "[:, None]"))
            out.add(*self._ahead(f"tl.minimum(start + {s.block}, last - 1)", "n_"))
            self._scores(out)
            self._weights(out)
            out.add(*(f"{name} = n_{name}" for name in self._carried()))

    def _units(self, side: Side, run: int, tokens: str, units: str) -> list[str]:
        w = side.walk
        lines = []
        for i, start in enumerate(w.loads):
            place = self._place("c_", w.units * w.runs, tokens)
            name = f"{side.name}w{run}_{i}"
            lines.append(
                f"{name} = tl.load({side.name}u + "
                f"({place} + ({run * w.units + start} + {side.name}r{units})))"
            )
        return lines

    def _loaded(self, side: Side, run: int) -> list[str]:
        return [f"{side.name}w{run}_{i}" for i in range(len(side.walk.loads))]

    def _scores(self, out: Lines) -> None:
        """s: the scores [tokens, rows] in units of log2, -inf where a query does not see a token."""
        spec = self.spec
        for run in range(self.k.walk.runs):
            out.add(*self.k.decoded(run, self._loaded(self.k, run)))
        for group in range(groups(spec.k, spec.dim)):
            onto = ""
            for i in self._slices_of(self.k, group):
                out.add(f"p = {self._dot(f'ka{i}', f'q{i}', onto)}")
                onto = "p"
            if has_zero(spec.k):
                out.add(f"p -= kz{group}.to(tl.float32)[:, None] * qz{group}[None, :]")
            scale = f" * {self._number(self.k, group)}" if grouped(spec.k) else ""
            by = f"p * (factor{scale})" + ("[:, None]" if grouped(spec.k) else "")
            out.add(f"s = {by}" if group == 0 else f"s += {by}")
        seen = "(start + rn)[:, None] < limit[None, :]"
        if spec.mask == "bool":
            seen = f"({seen}) & (mk != 0)"
        elif spec.mask == "float":
            out.add(f"s += mk.to(tl.float32) * {math.log2(math.e)!r}")
        out.add(f"s = tl.where({seen}, s, float('-inf'))")

    def _weights(self, out: Lines) -> None:
        """Adds the block's values, weighted by probability, to the outputs."""
        spec = self.spec
        out.add(
            "new = tl.maximum(m, tl.max(s, 0))",
            # A query that has seen nothing yet has no maximum to take away.
            "base = tl.where(new == float('-inf'), 0.0, new)",
            "w = tl.exp2(s - base[None, :])",
            "alpha = tl.exp2(m - base)",
            "lt = lt * alpha[None, :] + w",
            "m = new",
        )
        lane = TL[spec.v_lane]
        for run in range(self.v.walk.runs):
            out.add(*self.v.decoded(run, self._loaded(self.v, run)))
        if not grouped(spec.v):
            out.add(f"wv0 = w.to({lane})")
        for group in range(groups(spec.v, spec.dim)):
            if grouped(spec.v):
                out.add(f"wv{group} = (w * {self._number(self.v, group)}[:, None]).to({lane})")
            if has_zero(spec.v):
                out.add(
                    f"oz{group} = oz{group} * alpha + tl.sum(wv{group}.to(tl.float32) * "
                    f"vz{group}.to(tl.float32)[:, None], 0)"
                )
            for i in self._slices_of(self.v, group):
                out.add(f"o{i} = {self._dot(f'va{i}', f'wv{group}', f'o{i} * alpha[None, :]')}")

    def _tail(self, out: Lines) -> None:
        spec = self.spec
        out.add("l = tl.sum(lt, 0)")
        if has_zero(spec.v):
            for group in range(groups(spec.v, spec.dim)):
                out.add(*(f"o{i} -= oz{group}[None, :]" for i in self._slices_of(self.v, group)))
        if self._is_static(self.v):
            out.add(f"by = {self._static('v')}")
        slices = [i for group in range(groups(spec.v, spec.dim)) for i in self._slices_of(self.v, group)]
        if self._is_static(self.v):
            out.add(*(f"o{i} *= by" for i in slices))
        # Without a token that it sees a query's result is zero, as torch's is.
        for split in (False, True):
            with out.indent("if splits > 1:" if split else "if splits == 1:"):
                if split:
                    out.add(
                        "whole = (pair.to(tl.int64) * splits + part) * rows + rm",
                        "tl.store(sums + 2 * whole, m, mask=here)",
                        "tl.store(sums + (2 * whole + 1), l, mask=here)",
                    )
                    with out.indent("if first < last:"):
                        self._store(out, slices, "partial", "o{i}")
                else:
                    out.add(
                        "by_l = tl.where(l == 0.0, 0.0, 1.0 / l)",
                        f"whole = (b.to(tl.int64) * t + rt) * {spec.heads} + (h * {spec.group} + g)",
                    )
                    self._store(out, slices, "y", f"(o{{i}} * by_l[None, :]).to({TL[spec.x]})")

    def _store(self, out: Lines, slices: list[int], where: str, what: str) -> None:
        spec = self.spec
        for i in slices:
            start = self.v.start(i)
            short = start + self.v.walk.length > spec.dim
            keep = f"here[None, :] & ({start} + vr[:, None] < {spec.dim})" if short else "here[None, :]"
            out.add(
                f"tl.store({where} + (whole[None, :] * {spec.dim} + ({start} + vr[:, None])), "
                f"{what.format(i=i)}, mask={keep})"
            )


def source(spec: AttentionSpec, schedule: AttentionSchedule, *, plain: bool = False) -> str:
    """The kernels' module as text."""
    return Kernel(spec, schedule, plain).source()


def tables(spec: AttentionSpec, schedule: AttentionSchedule, *, plain: bool) -> dict[str, bool]:
    """Which of k_table and v_table the kernel reads."""
    made = Kernel(spec, schedule, plain)
    return {
        f"{side.name}_table": side.decodes_plainly and needs_table(side.format.element)
        for side in (made.k, made.v)
    }
