"""The CUDA target on paper: the kernels that a GPU would run, on a machine that has none.

In: a folded graph on a processor, bfloat16 or float16. Out: the same regions that the target `cuda` makes,
with the schedules of the card that they were measured on. Nothing of it runs; it is there to be looked at.

    Pipeline.parse("annotate{recipe=int4},fold,fuse,lower{target=cuda_on_paper}").run(gm)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch.fx import GraphModule

from ..codegen.device import DEFAULT, Device, device
from ..formats import BitfoldError
from ..lowering import register_target
from ..lowering.cuda.target import CudaTarget
from ..lowering.target import Compiled


@register_target
class OnPaper(CudaTarget):
    """Takes regions wherever they are."""

    name: ClassVar[str] = "cuda_on_paper"
    device: ClassVar[str] = "cpu"

    @staticmethod
    def card() -> Device:
        """The card that schedules were measured on."""
        return device(DEFAULT)

    def compile(self, gm: GraphModule, example_inputs: Sequence[Any], config: Mapping[str, Any]) -> Compiled:
        raise BitfoldError("the target cuda_on_paper shows kernels and runs none; take cuda on a GPU")
