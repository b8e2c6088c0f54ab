"""Which models are chains of blocks, and what blocks are given when they are run by themselves: twins that
compute the same are measured alike, or are said to be no chain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chain_model import codes
from torch import Tensor, nn
from torch.nn import functional as F

import bitfold as bf


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


class InPlace(Block):
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        residual += x
        return self.inner(residual), residual


class Chain(nn.Module):
    """`how`: what is done to the hidden value between blocks."""

    def __init__(self, kind: type[Block] = Block, how: str = "") -> None:
        super().__init__()
        self.blocks, self.how = nn.ModuleList(kind() for _ in range(3)), how

    def forward(self, x: Tensor) -> Tensor:
        rest = torch.zeros_like(x)
        for block in self.blocks:
            if isinstance(block, Beside | InPlace):
                x, rest = block(x, rest)
                continue
            x = block(x)
            if self.how == "in place":
                x += 5.0
            if self.how == "anew":
                x = x + 5.0
        return x + rest


def chain(*args: Any) -> Chain:
    torch.manual_seed(0)
    return Chain(*args).eval()


def asked(algorithm: str) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    batches = [torch.randn(2, 40, 32, generator=draw) for _ in range(3)]
    return {"algorithm": algorithm, "calibration": batches, "target": "reference"}


def solved(model: nn.Module, algorithm: str) -> list[Tensor]:
    return list(codes(bf.quantize(model, "int3[g32]", **asked(algorithm))).values())


def test_a_value_that_is_changed_between_blocks_breaks_the_chain() -> None:
    """However the change is written."""
    found = [solved(chain(Block, how), "gptq") for how in ("anew", "in place")]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    with pytest.raises(bf.BitfoldError, match=r"blocks\.1 is given what was changed in place"):
        solved(chain(Block, "in place"), "smooth")


@pytest.mark.parametrize("algorithm", ["gptq", "follow,gptq", "awq"])
def test_a_residual_that_travels_beside_is_that_of_the_rounded_blocks(algorithm: str) -> None:
    found = [solved(chain(kind), algorithm) for kind in (Block, Beside)]
    same = [float((a == b).float().mean()) for a, b in zip(*found, strict=True)]
    assert min(same) > 0.98  # the sums are in another order at the end


def test_a_block_that_writes_to_what_it_is_given_is_no_link() -> None:
    with pytest.raises(bf.BitfoldError, match=r"blocks\.0 writes to an argument"):
        solved(chain(InPlace), "gptq,learn{steps=5}")


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


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, **more: Any) -> Tensor:
        return self.model(input_ids=ids, **more).logits  # type: ignore[no-any-return]


def test_a_cache_of_keys_is_not_filled_within_another_model() -> None:
    """Each of the runs of a block would add to it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    ids = [torch.randint(50, (2, 24), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    found = []
    for wrap in (False, True):
        torch.manual_seed(0)
        llama = LlamaForCausalLM(config).eval()
        steps = {**asked("gptq,learn{steps=5}"), "calibration": [{"input_ids": one} for one in ids]}
        if wrap:
            steps["calibration"] = ids
        bf.quantize(Wrapped(llama) if wrap else llama, "int3[g32]", **steps)
        found.append(list(codes(llama).values()))
        assert llama.config.use_cache
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    steps["calibration"] = [{"ids": one, "use_cache": True} for one in ids]
    with pytest.raises(bf.BitfoldError, match="a cache of keys and values"):
        bf.quantize(Wrapped(LlamaForCausalLM(config)), "int3[g32]", **steps)


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
