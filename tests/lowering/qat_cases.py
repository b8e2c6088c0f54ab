"""How models train in these tests: options of a gradient, a model, its loss, one step."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitfold as bf
from bitfold.passes.rules import Rule

OPTIONS = {
    "straight": bf.Qat(),
    "lsq": bf.Qat("lsq", "lsq"),
    "smooth": bf.Qat("smooth:4+stochastic", "clip"),
}


def step(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> None:
    model(x).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    bf.advance(model)


def classify(model: nn.Module, x: Tensor, wanted: Tensor, steps: int, lr: float) -> list[float]:
    """Trains a model on one batch; the loss of each step."""
    optimizer = torch.optim.Adam(bf.parameter_groups(model, lr, lr / 10))
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(x), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bf.advance(model)
        losses.append(loss.item())
    return losses


class Net(nn.Module):
    """A head tied to a table, a linear that runs twice, a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 32)
        self.fc = nn.Linear(32, 32)
        self.conv = nn.Conv1d(32, 32, 3, padding=1)
        self.lm_head = nn.Linear(32, 16, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self.fc(torch.tanh(self.fc(x)))
        return self.lm_head(self.conv(x.transpose(1, 2)).transpose(1, 2))


TOKENS = torch.arange(20).reshape(4, 5) % 16
ALL = bf.Recipe("all", (Rule(op="*", weight="int4[g16]"),))


def loss(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    return F.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten())
