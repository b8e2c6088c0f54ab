"""One recipe tried on SmolLM2: what it weighs, what it understands, how fast it speaks, what it says.

In: a `Bench` (the float model on its device, its tokenizer, its stored codes, a text to be judged by) and a
recipe. Out: a `Trial`.

    loaded = load_smollm2()
    bench = Bench.of(loaded, pydoc_tokens(loaded.tokenizer), torch.device("cpu"))
    bench.trial("int8_all", batches=(1, 8), steps=48).perplexity   ->  15.87

The recipe "none" is the model as it is: the baseline that the others are held against.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..formats import Quantized
from ..lowering import quantize
from ..lowering.report import ATTRIBUTE
from ..passes.recipes import Recipe
from .measure import decode, weight_bytes
from .perplexity import perplexity
from .smollm2 import SmolLM2

PROMPT = "Explain in two or three sentences why bread rises."

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is (0: nobody knows)."""


@dataclass(frozen=True)
class Speed:
    """Decoding at one batch size: tokens a second over the whole batch, and seconds to compile for it."""

    tokens_per_second: float
    compile_seconds: float


@dataclass(frozen=True)
class Trial:
    """What a recipe gained and lost. `speeds` by batch size; `misses`: what was asked for and not given."""

    recipe: str
    about: str
    bytes: int
    perplexity: float
    quantize_seconds: float
    speeds: Mapping[int, Speed]
    text: str
    misses: tuple[str, ...]

    @property
    def compile_seconds(self) -> float:
        """For all batch sizes together."""
        return sum(speed.compile_seconds for speed in self.speeds.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Bench:
    """The float model in eval mode, and what it takes to judge its quantized copies."""

    model: Any
    tokenizer: Any
    stored: Mapping[str, Quantized]
    text: Tensor

    @classmethod
    def of(
        cls, loaded: SmolLM2, text: Tensor, device: torch.device, *, dtype: torch.dtype | None = None
    ) -> Bench:
        """`loaded` on the device, by default in the dtype that suits it: bfloat16 on a GPU, else float32."""
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        stored = {path: moved(codes, device) for path, codes in loaded.stored.items()}
        return cls(loaded.model.to(device, dtype), loaded.tokenizer, stored, text)

    def trial(
        self, recipe: str, *, batches: Sequence[int], steps: int, progress: Progress | None = None
    ) -> Trial:
        """Quantize a copy of the model, judge it and time it. Raises BitfoldError for a bad recipe."""
        report = progress or _silent
        model, seconds = self.quantized(recipe, report)
        judged = perplexity(model, self.text, progress=lambda n, of: report("perplexity", n, of))
        speeds: dict[int, Speed] = {}
        said = ""
        for batch in batches:
            decoding = self._decode(model, batch, steps, report)
            speeds[batch] = Speed(decoding.tokens_per_second, decoding.compile_seconds)
            said = said or self.tokenizer.decode(decoding.tokens[0], skip_special_tokens=True).strip()
        misses = tuple(str(miss) for miss in getattr(model, ATTRIBUTE, ()))
        about = Recipe.parse(recipe).about
        return Trial(recipe, about, weight_bytes(model), judged, seconds, speeds, said, misses)

    def quantized(self, recipe: str, report: Progress) -> tuple[Any, float]:
        """A copy of the model under the recipe, and the seconds that quantizing took."""
        model = shared_copy(self.model)
        wanted = Recipe.parse(recipe)
        if not wanted.rules:
            return model, 0.0
        began = time.perf_counter()
        model = quantize(
            model, wanted, stored=self.stored, progress=lambda what, n, of: report(f"quantize: {what}", n, of)
        )
        return model, time.perf_counter() - began

    def prompt(self, batch: int) -> Tensor:
        """The demo's question as the chat template puts it, int64 [batch, length]."""
        chat = [{"role": "user", "content": PROMPT}]
        text = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return torch.tensor([self.tokenizer(text)["input_ids"]] * batch)

    def _decode(self, model: Any, batch: int, steps: int, report: Progress) -> Any:
        report(f"compile for batch {batch}", 0, 0)
        return decode(
            model,
            self.prompt(batch),
            steps=steps,
            progress=lambda n, of: report(f"decode at batch {batch}", n, of),
        )


def shared_copy(model: Any) -> Any:
    """A copy with modules of its own that shares the parameters, so that several recipes start from one set.
    Quantizing drops a module's float weight and writes to none."""
    return copy.deepcopy(model, memo={id(parameter): parameter for parameter in model.parameters()})


def moved(codes: Quantized, device: torch.device) -> Quantized:
    """The same codes on another device."""
    parts = {name: getattr(codes, name).to(device) for name in codes.format.parts}
    return replace(codes, **parts)


def _silent(what: str, done: int, total: int) -> None:
    del what, done, total
