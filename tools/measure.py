"""What a model weighs and how fast it speaks.

In: a causal language model. Out: bytes of its weights, and the speed of decoding with a static cache.

    weight_bytes(model)                           ->  538060032
    decode(model, prompt, steps=32, options={})   ->  Decoding(tokens [1, 33], compile 18.2 s, 21.5 tokens/s)

Decoding is one token a step, greedy, through `torch.compile` as one graph; the prompt is read uncompiled
into the same cache. Compile time is that of the first step; speed comes from the median step, since a
machine that is shared now and then takes one away.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import BitfoldError

Step = Callable[[int, int], None]


@dataclass(frozen=True)
class Calls:
    """Seconds of the first call of a compiled model, and of the median call after it."""

    compile_seconds: float
    step_seconds: float


@dataclass(frozen=True)
class Decoding:
    """`tokens` [batch, steps + 1]; seconds of the first call and of the median step; tokens a second."""

    tokens: Tensor
    compile_seconds: float
    step_seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens.shape[0] / self.step_seconds


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and persistent buffers; a tensor that two names share counts once."""
    held = {
        id(tensor): tensor for tensor in (*model.parameters(), *model.state_dict(keep_vars=True).values())
    }
    return sum(tensor.nbytes for tensor in held.values() if isinstance(tensor, Tensor))


def decode(
    model: Any,
    prompt: Tensor,
    *,
    steps: int,
    options: dict[str, Any] | None = None,
    progress: Step | None = None,
) -> Decoding:
    """Greedy decoding of `steps` tokens after prompt [batch, length].

    options     keyword arguments of torch.compile (backend, mode, ...); None runs uncompiled
    progress    called with (steps done, steps)
    """
    if steps < 4:
        raise BitfoldError(f"decoding {steps} steps gives no median worth the name; ask for 4 at least")
    from transformers import StaticCache

    length = prompt.shape[1]
    device = next(model.parameters()).device
    cache = StaticCache(config=model.config, max_cache_len=_rounded(length + steps + 1))
    with torch.inference_mode():
        start = model(input_ids=prompt.to(device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = start.logits[:, -1].argmax(-1, keepdim=True)
        tokens, seconds = [token], []

        def step(token: Tensor) -> Tensor:
            out = model(input_ids=token, past_key_values=cache, use_cache=True)
            return out.logits[:, -1].argmax(-1, keepdim=True)  # type: ignore[no-any-return]

        run = step
        if options is not None:
            # Each call here compiles a new `step`, and Dynamo limits those of one line of code.
            torch._dynamo.reset()
            run = torch.compile(step, fullgraph=True, dynamic=False, **options)
        for done in range(1, steps + 1):
            began = time.perf_counter()
            token = run(token).clone()  # a CUDA graph gives the same memory each time
            _wait(device)
            seconds.append(time.perf_counter() - began)
            tokens.append(token)
            if progress is not None:
                progress(done, steps)
    # With CUDA graphs the second and third calls warm up and record.
    return Decoding(torch.cat(tokens, dim=1).cpu(), seconds[0], median(seconds[3:]))


def time_calls(
    model: Any, inputs: Sequence[Any], *, calls: int, options: dict[str, Any] | None = None
) -> Calls:
    """Time compiled calls of any model on the same inputs."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    torch._dynamo.reset()
    run: Any = torch.compile(model, **(options or {}))
    seconds = []
    with torch.inference_mode():
        for _ in range(calls + 3):
            began = time.perf_counter()
            run(*inputs)
            _wait(device)
            seconds.append(time.perf_counter() - began)
    return Calls(seconds[0], median(seconds[3:]))


def _rounded(length: int) -> int:
    """A cache's length in whole 64s, so that attention's inner loops have no ragged end."""
    return -(-length // 64) * 64


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
