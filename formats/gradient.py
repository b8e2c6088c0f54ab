"""Which gradient goes through a rounding, and how it is computed: data, with a short text form.

In: nothing. Out: a `Gradient`, which prints and parses, so that an operator can carry it.

    Gradient.parse("lsq+stochastic")  ->  Gradient("lsq", stochastic=True)

    straight   dv/dx = 1
    clip       dv/dx = 1 where x lies in the range of the codes, half a step beyond included (all that rounds
               to them without being cut off), else 0
    lsq        the same without the half step, and a learned step: LSQ (arXiv 1902.08153), with a learned
               smallest value for formats that have a zero point: LSQ+ (2004.09576)
    pact       the same, and a learned end of the range: PACT (1805.06085), for both signs
    smooth:k   the derivative of a staircase of tanh, steeper with k, of mean 1 over a step (DSQ, 1908.05033)

Each is a file in `estimators/`, where others can be added. `stochastic` rounds up with the probability that
makes the mean exact (Gupta et al., 1502.02551), in training only. `item`: what is learned counts the numbers
of one item of the batch, as LSQ's paper has it for activations. `keep`: a compiled step keeps the rounded
numbers for its backward pass, where it would round once more. `kernel`: by an operator of its own, for which
a GPU has one kernel a direction (`round_groups.py`); `fused`: in plain torch, which a compiler fuses into
what stands around. Neither: `straight` by a kernel where a GPU has one, everything else fused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from . import estimators
from .errors import FormatError
from .format import Format

FLAGS = ("stochastic", "item", "keep", "kernel", "fused")
OFFERED = tuple(f"+{flag}" for flag in FLAGS if flag != "item")
"""What a user may add to a text; `item` is set where a graph is made."""


@dataclass(frozen=True)
class Gradient:
    """kind: an estimator's name; number: that of `name:number`, for those that take one (None: its default);
    flags: see the file."""

    kind: str = "straight"
    number: float | None = None
    stochastic: bool = False
    item: bool = False
    keep: bool = False
    kernel: bool = False
    fused: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str):
            raise FormatError(f"a gradient is called by a name such as 'lsq', not {self.kind!r}")
        default = estimators.named(self.kind).number
        if self.number is None:
            object.__setattr__(self, "number", default)
        elif default is None:
            raise FormatError(f"{self.kind} takes no number, and was given {self.number!r}")
        elif not isinstance(self.number, int | float) or isinstance(self.number, bool):
            raise FormatError(f"{self.kind} takes a number such as {default:g}, not {self.number!r}")
        else:
            self.estimator.check_number(self.number)
        for flag in FLAGS:
            if not isinstance(getattr(self, flag), bool):
                raise FormatError(f"{flag} is True or False, not {getattr(self, flag)!r}")
        if self.kernel and self.fused:
            raise FormatError("a rounding is done by a kernel of its own or fused, not both")
        if self.kernel and self.stochastic:
            raise FormatError("no kernel rounds at random; leave +kernel out, or +stochastic")

    @property
    def estimator(self) -> estimators.Estimator:
        """What it computes."""
        return estimators.named(self.kind)

    @property
    def name(self) -> str:
        """The text without flags."""
        return self.kind if self.number is None else f"{self.kind}:{_text(self.number)}"

    @property
    def learns(self) -> bool:
        """Whether scales are parameters."""
        return bool(self.estimator.learns)

    def check(self, fmt: Format) -> None:
        """Raises FormatError, one sentence, for a format that cannot be trained so."""
        self.estimator.check(fmt)

    def of_item(self) -> Gradient:
        """The same for activations."""
        return replace(self, item=self.estimator.by_item)

    def without_scales(self) -> Gradient:
        """The same where scales are chosen anew in each call, so that there is nothing to learn."""
        return replace(self, kind="straight", number=None, item=False) if self.learns else self

    @classmethod
    def parse(cls, text: str | Gradient) -> Gradient:
        """The gradient that `str` wrote. Raises FormatError for anything else."""
        if isinstance(text, Gradient):
            return text
        if not isinstance(text, str):
            raise FormatError(f"a gradient is text such as 'lsq' or a Gradient, not {text!r}")
        name, *flags = text.split("+")
        kind, colon, number = name.partition(":")
        for flag in flags:
            if flag not in FLAGS:
                raise FormatError(f"{text!r}: {flag!r} says nothing; a gradient may be {', '.join(OFFERED)}")
        try:
            given = float(number) if colon else None
        except ValueError as error:
            raise FormatError(
                f"{text!r}: what stands behind the colon is a number, as in smooth:5"
            ) from error
        return cls(kind, given, **{flag: flag in flags for flag in FLAGS})

    def __str__(self) -> str:
        return self.name + "".join(f"+{flag}" for flag in FLAGS if getattr(self, flag))


def _text(number: float) -> str:
    """The shortest text that parses to the number, without a plus, which begins a flag."""
    short = f"{number:g}"
    return (short if float(short) == number else repr(float(number))).replace("e+", "e")
