"""The reference target: every folded operator as it is, one after the other, on any device.

In: a region. Out: the same region. What other targets compute is compared with this one, bit for bit between
the capture scopes, and within `tolerance.py` against compiled code.

    dequantize -> linear   stays   dequantize -> linear
"""

from __future__ import annotations

from typing import ClassVar

from torch.fx import GraphModule

from .target import Target


class ReferenceTarget(Target):
    """Takes everything, changes nothing, compiles nothing."""

    name: ClassVar[str] = "reference"

    def supports(self, region: GraphModule) -> bool:
        return True

    def lower(self, region: GraphModule) -> GraphModule:
        return region
