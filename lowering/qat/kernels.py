"""Whether kernels round what a gradient asks them to by name (`+kernel`).

In: a graph that trains. Out: what is asked for in vain where the model is now; a sentence, if nowhere.

    weight nvfp4, "clip+kernel"           ->  BitfoldError: .. no kernel rounds f32 numbers to nvfp4: ..
    weight int4, "clip+kernel", on a CPU  ->  a Miss: the reference rounds, which no compiler fuses
"""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from ...codegen import CodegenError
from ...formats import BitfoldError
from ...formats.gradient import Gradient
from ...formats.round_groups import KERNELS
from ...passes import MissRecord
from ...passes.edges import edge
from ...passes.training.quantizers import TRAIN_QUANTIZE
from ..cuda.rounding import spec


def check_kernels(gm: GraphModule) -> list[MissRecord]:
    """Requests for kernels on a device that has none. Raises BitfoldError for what no device has."""
    misses = []
    for node in gm.graph.find_nodes(op="call_function", target=TRAIN_QUANTIZE):
        how = Gradient.parse(str(node.args[2]))
        if not how.kernel:
            continue
        on: Any = edge(node)
        try:
            _specs(node, how)
        except CodegenError as error:
            raise BitfoldError(
                f"the {on.which} of layer {on.layer} is to be rounded by {str(how)!r}: {error}; leave "
                "+kernel out"
            ) from error
        device = node.meta["val"].device.type
        if device not in KERNELS:
            reason = f"{device} has no kernel that rounds; the reference does, which no compiler fuses"
            misses.append(MissRecord(node.name, on.layer, "", f"{on.which} {how}", reason))
    return misses


def _specs(node: Node, how: Gradient) -> None:
    """Both directions, if kernels have them."""
    source, text, _, held = node.args[:4]
    assert isinstance(source, Node)
    x = source.meta["val"]
    spec(x.dtype, x.shape[-1], str(text), "forward", given=bool(held))
    if not how.estimator.identity:
        spec(x.dtype, x.shape[-1], str(text), how.name, given=True)
