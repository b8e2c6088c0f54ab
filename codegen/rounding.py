"""What a kernel that rounds numbers in training is for: a format, the dtype, and which direction.

In: a format and the length of a row. Out: a `RoundingSpec`, or a CodegenError that says why there is none.

    RoundingSpec("int4[g32]", "bf16", 32, "forward", given=False)    scales from the numbers, in one pass
    RoundingSpec("int4[g32]", "bf16", 32, "lsq", given=True)         both gradients, scales being given

A direction is `forward`, or a gradient's name (`formats/estimators/`), whose lines the kernel has.

Numbers that share a scale are `group` numbers in a row of memory: a group, or the row.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..formats import Format, FormatError, Integer, format
from ..formats.estimators import Kernel
from ..formats.gradient import Gradient
from ..formats.sparsity import Dense
from .attention import RULES, SCALE_TYPES, TYPES
from .spec import CodegenError

FORWARD = "forward"
WIDEST = 16384
"""Numbers of a row that one program holds in registers."""


@dataclass(frozen=True)
class RoundingSpec:
    """format: its text; lane: bf16, f16 or f32; group: numbers that share a scale; direction: forward, or a
    gradient's name; given: whether scales (and zero points) are inputs, or chosen from the numbers."""

    format: str
    lane: str
    group: int
    direction: str = FORWARD
    given: bool = False

    def __post_init__(self) -> None:
        why = _obstacle(format(self.format), self)
        if why:
            raise CodegenError(f"no kernel rounds {self.lane} numbers to {self.format}: {why}")

    @property
    def wide(self) -> int:
        """The power of two that holds a group."""
        return 1 << (self.group - 1).bit_length()

    @property
    def rows(self) -> int:
        """Groups of a program: tiles of about 2048 numbers."""
        return max(1, 2048 // self.wide)

    @property
    def zero(self) -> bool:
        """Whether there are zero points."""
        scale = format(self.format).scale
        return scale is not None and scale.zero == "int"

    @property
    def backward(self) -> Kernel | None:
        """The lines of the gradient; None for the other direction."""
        if self.direction == FORWARD:
            return None
        how = Gradient.parse(self.direction)
        return how.estimator.kernel(format(self.format), how.number)

    @property
    def learned(self) -> tuple[str, ...]:
        """What else has a gradient, which is made too."""
        if self.direction == FORWARD:
            return ()
        return Gradient.parse(self.direction).estimator.names(format(self.format))


def rounding_spec(fmt: Format, x_lane: str, k: int, direction: str, given: bool) -> RoundingSpec:
    """The spec for rows of k numbers. Raises CodegenError if there is none."""
    group = fmt.cols or k
    if k % group:
        raise CodegenError(f"groups of {group} do not divide rows of {k}")
    return RoundingSpec(str(fmt), x_lane, group, direction, given)


def _obstacle(fmt: Format, spec: RoundingSpec) -> str:
    scale, element = fmt.scale, fmt.element
    if spec.lane not in TYPES:
        return f"numbers are {', '.join(TYPES)}"
    if not 1 < spec.group <= WIDEST:
        return f"a program holds 2 to {WIDEST} numbers that share a scale, not {spec.group}"
    if scale is None or not isinstance(fmt.sparsity, Dense):
        return "it has no scale, or does not store every number"
    if scale.granularity.rows != 1:
        return "numbers that share a scale lie in a row of memory"
    if scale.native or scale.two_level or scale.dtype not in SCALE_TYPES or scale.rule not in RULES:
        return f"scales are {', '.join(SCALE_TYPES)}, chosen by {', '.join(RULES)}"
    if scale.zero not in ("none", "int"):
        return "zero points are integers"
    if hasattr(element, "table"):
        return "a codebook is looked up, not computed"
    if isinstance(element, Integer) and not element.signed and scale.zero == "none":
        return "unsigned codes need a zero point"
    if element.bits < 2:
        return "one bit has no zero"
    return "" if spec.direction == FORWARD else _no_lines(fmt, spec)


def _no_lines(fmt: Format, spec: RoundingSpec) -> str:
    try:
        how = Gradient.parse(spec.direction)
        how.check(fmt)
    except FormatError as error:
        return str(error)
    if how != Gradient(how.kind, how.number):
        return f"a direction is a gradient without flags, {how.name}"
    lines = spec.backward
    if lines is None:
        return f"the gradient {how.name} has no lines of Triton"
    if len(lines.for_held) != len(spec.learned):
        return (
            f"the gradient {how.name} has {len(lines.for_held)} sums for {len(spec.learned)} learned numbers"
        )
    return ""
