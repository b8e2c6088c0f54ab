"""What a model weighs and how fast it speaks.

In: a causal language model. Out: bytes of its weights, and the speed of decoding with a static cache.

    weight_bytes(model)                           ->  538060032
    decode(model, prompt, steps=32)               ->  Decoding(tokens [1, 33], compile 18.2 s, 21.5 tokens/s)

Decoding is one token a step, greedy, compiled a layer at a time (`decoding.py`). Compile time is that of the
first step; speed comes from the median step, since a machine that is shared now and then takes one away.
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
from ..lowering.folded import Folded
from .decoding import Decoder

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


def pick_device(asked: str | None) -> torch.device:
    """The device asked for, by default a CUDA GPU if there is one. Raises BitfoldError if it is not there."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise BitfoldError("torch sees no CUDA GPU here; leave the device out, or give cpu")
    return torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers; a tensor that two names share counts once."""
    held = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in held.values())


def decode(
    model: Any, prompt: Tensor, *, steps: int, compiled: bool = True, progress: Step | None = None
) -> Decoding:
    """Greedy decoding of `steps` tokens after prompt [batch, length]. Raises BitfoldError for a model that is
    not built like Llama. `progress` is called with (steps done, steps)."""
    if steps < 4:
        raise BitfoldError(f"decoding {steps} steps gives no median worth the name; ask for 4 at least")
    device = next(model.parameters()).device
    batch, length = prompt.shape
    with torch.inference_mode():
        decoder = Decoder(model, batch=batch, length=_rounded(length + steps + 1))
        tokens = [decoder.read(prompt.to(device))]
        _wait(device)
        if compiled:
            decoder.compile("bitfold" if _is_quantized(model) else None)
        began = time.perf_counter()
        tokens.append(decoder.step(tokens[-1]))
        run = decoder.graph(tokens[-1]) if compiled and device.type == "cuda" else decoder.step
        _wait(device)
        first = time.perf_counter() - began
        seconds = []
        # Nothing that a guard looks at changes from here on, and looking takes a tenth of a CPU's step.
        with torch.compiler.set_stance("default", skip_guard_eval_unsafe=True):
            for done in range(2, steps + 1):
                began = time.perf_counter()
                tokens.append(run(tokens[-1]))
                _wait(device)
                seconds.append(time.perf_counter() - began)
                if progress is not None:
                    progress(done, steps)
    return Decoding(torch.cat(tokens, dim=1).cpu(), first, median(seconds))


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


def _is_quantized(model: nn.Module) -> bool:
    return any(isinstance(module, Folded) for module in model.modules())


def _rounded(length: int) -> int:
    """A cache's length in whole 64s, so that attention's inner loops have no ragged end."""
    return -(-length // 64) * 64


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
