"""Which gradient goes through a rounding, and what is learned of its scales: data, with a short text form.

In: nothing. Out: a `Gradient`, which prints and parses, so that an operator can carry it.

    Gradient.parse("lsq+stochastic")  ->  Gradient("lsq", stochastic=True)

    straight   dv/dx = 1
    clip       dv/dx = 1 where x lies in the range of the codes, half a step beyond included (all that rounds
               to them without being cut off), else 0
    lsq        the same without the half step, and a learned step: LSQ (arXiv 1902.08153), with a learned
               smallest value for formats that have a zero point: LSQ+ (2004.09576)
    pact       the same, and a learned end of the range: PACT (1805.06085), for both signs
    smooth:k   the derivative of a staircase of tanh, steeper with k, of mean 1 over a step (DSQ, 1908.05033)

`stochastic` rounds up with the probability that makes the mean exact (Gupta et al., 1502.02551), in training
only. `item`: LSQ's factor counts the numbers of one item of the batch, as the paper has it for activations.
`keep`: a compiled step keeps the rounded numbers for its backward pass, where it would round once more.
`kernel`: by an operator of its own, for which a GPU has one kernel a direction (`round_groups.py`); `fused`:
in plain torch, which a compiler fuses into what stands around. Neither: `straight` by a kernel where a GPU
has one, everything else fused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .errors import FormatError, nearest

KINDS = ("straight", "clip", "lsq", "pact", "smooth")
LEARNING = ("lsq", "pact")
FLAGS = ("stochastic", "item", "keep", "kernel", "fused")
STAIRCASE = 5.0
"""The sharpness of `smooth`, if none is given."""


@dataclass(frozen=True)
class Gradient:
    """kind and flags: see the file; sharpness: k of `smooth`; stochastic: how training rounds."""

    kind: str = "straight"
    sharpness: float = STAIRCASE
    stochastic: bool = False
    item: bool = False
    keep: bool = False
    kernel: bool = False
    fused: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise FormatError(
                f"a gradient is one of {', '.join(KINDS)}, not {self.kind!r}{nearest(self.kind, KINDS)}"
            )
        if self.kernel and self.fused:
            raise FormatError("a rounding is done by a kernel of its own or fused, not both")
        if not isinstance(self.sharpness, int | float) or not 0 < self.sharpness <= 100:
            raise FormatError(
                f"the sharpness of a staircase is above 0 and at most 100, not {self.sharpness!r}"
            )
        if self.kind != "smooth" and self.sharpness != STAIRCASE:
            raise FormatError(f"only smooth takes a sharpness, and {self.kind!r} was given {self.sharpness}")

    @property
    def learns(self) -> bool:
        """Whether scales are parameters."""
        return self.kind in LEARNING

    def of_item(self) -> Gradient:
        """The same for activations."""
        return replace(self, item=self.kind == "lsq")

    def without_scales(self) -> Gradient:
        """The same where scales are chosen anew in each call, so that there is nothing to learn."""
        return replace(self, kind="straight", item=False) if self.learns else self

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
                raise FormatError(
                    f"{text!r}: {flag!r} says nothing; a gradient may be +stochastic, +keep, +kernel, +fused"
                )
        if colon and kind != "smooth":
            raise FormatError(f"{text!r}: only smooth takes a number")
        try:
            sharpness = float(number) if colon else STAIRCASE
        except ValueError as error:
            raise FormatError(f"{text!r}: a sharpness is a number, such as smooth:5") from error
        return cls(kind, sharpness, **{flag: flag in flags for flag in FLAGS})

    def __str__(self) -> str:
        name = f"smooth:{self.sharpness:g}" if self.kind == "smooth" else self.kind
        return name + "".join(f"+{flag}" for flag in FLAGS if getattr(self, flag))
