"""The models of `cpu_conv.py`, with random numbers in them: a ResNet, EfficientNet-Lite0's shape, an MLP.

In: a name. Out: a model in eval mode, and the shape of one input.

    build("resnet")   ->   ResNet-18 (basic blocks of 64 to 512 channels), [1, 3, 96, 96]
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn


def normed(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution without bias, and its batch norm."""
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class Basic(nn.Module):
    """Two convolutions of 3 x 3 and a residual."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(*normed(inputs, outputs, 3, stride), nn.ReLU())
        self.second = nn.Sequential(*normed(outputs, outputs, 3))
        self.short = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.short = nn.Sequential(*normed(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(self.first(x)) + self.short(x))


def resnet(width: int = 64, blocks: int = 2) -> nn.Module:
    """ResNet-18, if of 64 channels (He et al., Deep Residual Learning, table 1)."""
    layers: list[nn.Module] = [*normed(3, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = width
    for stage in range(4):
        for block in range(blocks):
            layers.append(Basic(inputs, width << stage, 2 if stage and not block else 1))
            inputs = width << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


class Inverted(nn.Module):
    """Wide 1 x 1, depthwise, narrow 1 x 1, and a residual where the shape is kept."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, widen: int) -> None:
        super().__init__()
        inner = inputs * widen
        steps = [*normed(inputs, inner, 1), nn.ReLU6()] if widen > 1 else []
        steps += [*normed(inner, inner, size, stride, inner), nn.ReLU6(), *normed(inner, outputs, 1)]
        self.steps, self.residual = nn.Sequential(*steps), stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return self.steps(x) + x if self.residual else self.steps(x)


# kernel, stride, widening, channels, blocks: EfficientNet-B0's (Tan and Le, table 1).
_LITE0 = (
    *((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3)),
    *((5, 1, 6, 112, 3), (5, 2, 6, 192, 4), (3, 1, 6, 320, 1)),
)


def lite0() -> nn.Module:
    """EfficientNet-Lite0: B0 with ReLU6 and no squeeze-and-excitation."""
    layers, inputs = [*normed(3, 32, 3, 2), nn.ReLU6()], 32
    for size, stride, widen, outputs, blocks in _LITE0:
        for block in range(blocks):
            layers.append(Inverted(inputs, outputs, size, 1 if block else stride, widen))
            inputs = outputs
    layers += [*normed(inputs, 1280, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(1280, 1000))


def mlp() -> nn.Module:
    """784 numbers, three layers of 1024, ten classes."""
    sizes = (784, 1024, 1024, 1024)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(1024, 10))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet": (resnet, (3, 96, 96)),
    "resnet-32": (lambda: resnet(32), (3, 96, 96)),
    "lite0": (lite0, (3, 224, 224)),
    "mlp": (mlp, (784,)),
}


def build(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """The model, its running statistics those of random images, and the shape of an input."""
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(torch.randn(8, *shape))
    return model.eval(), shape
