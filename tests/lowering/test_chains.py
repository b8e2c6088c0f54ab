"""What blocks are given when they are run by themselves is what the model gives them: twins that compute the
same are measured alike."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from chain_model import codes
from torch import Tensor, nn
from torch.nn import functional as F

import bitfold as bf
from bitfold.passes.algorithms.gptq import GPTQ


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def inner(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(self.norm(x))))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Beside(Block):
    """The residual is an argument and a result of its own."""

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        residual = residual + x
        return self.inner(residual), residual


class Chain(nn.Module):
    def __init__(self, kind: type[Block] = Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        rest = torch.zeros_like(x)
        for block in self.blocks:
            if isinstance(block, Beside):
                x, rest = block(x, rest)
            else:
                x = block(x)
        return x + rest


def chain(kind: type[Block] = Block) -> Chain:
    torch.manual_seed(0)
    return Chain(kind).eval()


def asked(algorithm: str) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    batches = [torch.randn(2, 40, 32, generator=draw) for _ in range(3)]
    return {"algorithm": algorithm, "calibration": batches, "target": "reference"}


def solved(model: nn.Module, algorithm: str) -> list[Tensor]:
    return list(codes(bf.quantize(model, "int3[g32]", **asked(algorithm))).values())


@pytest.mark.parametrize("algorithm", ["gptq", "follow,gptq", "awq"])
def test_a_residual_that_travels_beside_is_that_of_the_rounded_blocks(algorithm: str) -> None:
    found = [solved(chain(kind), algorithm) for kind in (Block, Beside)]
    same = [float((a == b).float().mean()) for a, b in zip(*found, strict=True)]
    assert min(same) > 0.98  # the sums are in another order at the end


def test_a_users_hook_before_a_block_runs_once() -> None:
    def twice(module: nn.Module, args: Any) -> Any:
        return (2 * args[0],)

    class Doubled(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x)

    hooked, plain = chain(), chain()
    plain.__class__ = Doubled
    hooked.blocks[0].register_forward_pre_hook(twice)
    pairs = zip(solved(hooked, "gptq"), solved(plain, "gptq"), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


class Reading(Block):
    """What it multiplies by is no argument: the model's forward leaves it here."""

    gate: ClassVar[Any] = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x * self.gate)


class Leaving(Chain):
    def forward(self, x: Tensor) -> Tensor:
        Reading.gate = x.mean((0, 1)).sign()
        return super().forward(x)


class Casting(Chain):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


@pytest.mark.parametrize("model", [lambda: Leaving(Reading), Casting])
def test_blocks_that_read_more_than_their_arguments_are_no_chain(model: Callable[[], Chain]) -> None:
    torch.manual_seed(0)
    blocks = model().eval()
    with pytest.raises(bf.BitfoldError, match="when they are run by themselves"):
        solved(copy.deepcopy(blocks), "learn{steps=5}")
    bf.quantize(blocks, "int3[g32]", **asked("gptq"))
    assert "run by themselves" in str(bf.report(blocks))


class Spoiling(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / (0.0 if x.shape[1] == 7 else 1.0)


def test_numbers_that_a_block_spoils_are_found_in_the_first_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GPTQ, "solve", lambda self, task: pytest.fail("solving began"))
    model, steps = chain(), asked("gptq")
    model.blocks[1] = Spoiling().eval()
    steps["calibration"].append(torch.randn(2, 7, 32))
    with pytest.raises(bf.BitfoldError, match=r"batch 3 gives NaN or infinity behind blocks\.1"):
        bf.quantize(model, "int3[g32]", **steps)


class Silent(Block):
    """Nothing but zeros comes into its second layer."""

    def inner(self, x: Tensor) -> Tensor:
        return self.down(0 * self.up(self.norm(x)))  # type: ignore[no-any-return]


def test_a_layer_that_is_given_zeros_stays_as_it_is() -> None:
    followed, plain = (solved(chain(Silent), algorithm) for algorithm in ("follow,gptq", "gptq"))
    assert torch.equal(followed[1], plain[1])


class Frozen(Block):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("algorithm", ["learn{steps=5}", "tune{steps=5}"])
def test_learning_without_gradients_is_said(algorithm: str) -> None:
    model = chain(Frozen)
    with pytest.raises(bf.BitfoldError, match=r"no gradient in .*: its forward computes under torch"):
        solved(model, algorithm)
    assert type(model.blocks[0].up) is nn.Linear


class Plain(Block):
    """No vector and no rows make the channels that a linear reads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Identity()

    def inner(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x))))  # type: ignore[no-any-return]


def test_a_block_that_cannot_be_balanced_is_in_the_report() -> None:
    model = chain(Plain)
    solved(model, "smooth")
    assert "blocks.1: smooth" in str(bf.report(model)) and "nothing in it can be balanced" in str(
        bf.report(model)
    )


class Stateful(Block):
    """Every call counts, and shows in what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x + self.inner(x) * self.calls


@pytest.mark.parametrize("algorithm", ["gptq,correct_bias", "gptq,learn{steps=5}", "awq"])
def test_every_run_of_a_block_starts_from_the_same_buffers(algorithm: str) -> None:
    counting, plain = chain(Stateful), chain()
    found = solved(counting, algorithm)
    assert all(torch.equal(a, b) for a, b in zip(found, solved(plain, algorithm), strict=True))
    assert all(block.calls == 0 for block in counting.blocks)
