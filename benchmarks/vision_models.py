"""The networks of `vision_and_text.py`: EfficientNet-Lite0 under its weights' names, and one for digits.

In: nothing, or the path of the weights. Out: a model in eval mode.

    efficientnet_lite0(path)  ->  logits [N, 1000] of images [N, 3, 224, 224]
    digits_network()          ->  logits [N, 10] of images [N, 1, 8, 8], not trained yet
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# kernel, stride, widening, channels, blocks: EfficientNet-B0's (Tan and Le, table 1), without
# squeeze-and-excitation and with ReLU6.
STAGES = (
    *((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3)),
    *((5, 1, 6, 112, 3), (5, 2, 6, 192, 4), (3, 1, 6, 320, 1)),
)


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """Wide 1 x 1, depthwise, narrow 1 x 1, and a residual where the shape is kept."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, widen: int) -> None:
        super().__init__()
        inner = inputs * widen
        self.widens, self.residual = widen > 1, stride == 1 and inputs == outputs
        if self.widens:
            self._expand_conv, self._bn0 = nn.Conv2d(inputs, inner, 1, bias=False), norm(inner)
        # As TensorFlow pads: of an odd total the larger part right and below. A module of its own, so that
        # the convolution is a stock one.
        total = max(size - stride, 0)
        self._pad = nn.ZeroPad2d((total // 2, total - total // 2) * 2)
        self._depthwise_conv = nn.Conv2d(inner, inner, size, stride, groups=inner, bias=False)
        self._bn1 = norm(inner)
        self._project_conv, self._bn2 = nn.Conv2d(inner, outputs, 1, bias=False), norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.widens else x
        y = F.relu6(self._bn1(self._depthwise_conv(self._pad(y))))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """Attributes are named as the weights are."""

    def __init__(self) -> None:
        super().__init__()
        self._pad = nn.ZeroPad2d((0, 1, 0, 1))
        self._conv_stem, self._bn0 = nn.Conv2d(3, 32, 3, 2, bias=False), norm(32)
        blocks, inputs = [], 32
        for size, stride, widen, outputs, count in STAGES:
            for index in range(count):
                blocks.append(Block(inputs, outputs, size, 1 if index else stride, widen))
                inputs = outputs
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = nn.Conv2d(320, 1280, 1, bias=False), norm(1280)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._conv_stem(self._pad(x))))
        x = F.relu6(self._bn1(self._conv_head(self._blocks(x))))
        return self._fc(F.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]


def efficientnet_lite0(path: str | Path) -> EfficientNetLite0:
    """With the published numbers."""
    model = EfficientNetLite0()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval()


class Residual(nn.Module):
    """Two convolutions and a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norms[0](self.one(x)))
        return torch.relu(x + self.norms[1](self.two(y)))


def digits_network(channels: int = 32) -> nn.Module:
    """A small residual network for images of 8 x 8."""
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
        Residual(channels),
        nn.Conv2d(channels, 2 * channels, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * channels), nn.ReLU(),
        Residual(2 * channels), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * channels, 10),
    )  # fmt: skip
