"""A model that was trained on rounded numbers, from its file, on a target: the logits and the tokens it says.

In: a file that qat_lm.py wrote (`--save`). Out: for each target a line of JSON: how far logits are from the
reference target's, how far they may be, and whether greedy decoding says the same tokens.

    python benchmarks/qat_targets.py out/qat-lm-int4.safetensors --target cpu          float32
    python benchmarks/qat_targets.py out/qat-lm-int4.safetensors --target cuda         on a GPU: bfloat16

Logits are compared for whole texts at once, and for the beginnings of texts a few rows at a time: which
kernel a linear takes depends on its rows, and many rows of bfloat16 may take the very product that the
reference takes.

How far they may be: two correct ways of computing a linear differ by roundings, of each weight to the
dtype, of the float32 sums and of both results. They are taken as independent (Higham and Mary, A new
approach to probabilistic rounding error analysis, 2019): the model that the file holds runs in the dtype
with each linear's result moved at random by as much, and again with other random numbers; the tolerance is
twice the largest difference of several such runs from the one that is not moved, since both targets are
rounded. Where tokens differ first, the margin between the reference's two likeliest tokens is given; below
the tolerance it is a tie that rounding decides.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from qat_report import RESULTS, write
from small_llama import FOLDER, Size, SmallLlama
from torch import Tensor, nn

import bitfold as bf
from bitfold.lowering.tolerance import FLOAT32_ROUNDOFF, roundoff

DRAWS = 8
ROWS = (1, 16, 64)
"""Rows of the small products."""


def skeleton(size: Size, dtype: torch.dtype, device: str) -> SmallLlama:
    return SmallLlama(size).to(device, dtype).eval()


def prompts(size: Size, count: int, length: int, device: str) -> Tensor:
    """Random tokens: a model's numbers, not its words, are what is compared."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(size.vocab_size, (count, length), generator=draw).to(device)


def moved(model: SmallLlama, texts: Sequence[Tensor], dtype: torch.dtype) -> list[float]:
    """For each batch of tokens [texts, length] the most that logits move when linears round otherwise."""
    plain = SmallLlama(model.size).to(texts[0].device, dtype).eval()
    plain.load_state_dict(_floats(model), strict=False)
    plain.lm_head.weight = plain.model.embed_tokens.weight
    draw = torch.Generator(texts[0].device).manual_seed(0)
    still = [plain(ids).double() for ids in texts]
    handles = [
        m.register_forward_hook(partial(_off, draw)) for m in plain.modules() if isinstance(m, nn.Linear)
    ]
    worst = [0.0] * len(texts)
    for _ in range(DRAWS):
        for number, ids in enumerate(texts):
            worst[number] = max(worst[number], float((plain(ids).double() - still[number]).abs().max()))
    for handle in handles:
        handle.remove()
    return worst


def _off(draw: torch.Generator, module: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> Tensor:
    """A linear's result, rounded otherwise.

    Uniform errors of up to u have a standard deviation of u / sqrt(3). K weights that are off by up to u
    each move the sum by a normal number whose variance is u**2 / 3 sum (x w)**2; K roundings of a float32
    sum by at most u32**2 / 3 K sum (x w)**2, whose partial sums grow as those of independent terms do. Two
    results are rounded.
    """
    x, weight = args[0].double(), module.weight.detach().double()  # type: ignore[operator]
    unit, k = roundoff(result.dtype), weight.shape[-1]
    spread = (x.square() @ weight.square().t()).mul_((unit**2 + k * FLOAT32_ROUNDOFF**2) / 3).sqrt_()
    normal = torch.randn(result.shape, generator=draw, device=result.device, dtype=torch.float64)
    even = torch.rand(result.shape, generator=draw, device=result.device, dtype=torch.float64) * 2 - 1
    return (result.double() * (1 + 2 * unit * even) + spread * normal).to(result.dtype)


def _floats(model: SmallLlama) -> dict[str, Tensor]:
    """Decoded weights by path."""
    found = {
        name: tensor.double() for name, tensor in model.state_dict().items() if tensor.is_floating_point()
    }
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor):
            found[f"{path}.weight"] = weight.detach().double()
    return found


def greedy(model: SmallLlama, ids: Tensor, steps: int) -> Tensor:
    """Tokens after one prompt [1, length]."""
    for _ in range(steps):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
    return ids


@torch.no_grad()
def compare(path: Path, size: Size, target: str, given: argparse.Namespace) -> dict[str, Any]:
    """One line."""
    device, dtype = ("cuda", torch.bfloat16) if target == "cuda" else ("cpu", torch.float32)
    there, here = skeleton(size, dtype, device), skeleton(size, dtype, device)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        bf.load(path, into=there, target=target)
    bf.load(path, into=here, target="reference")
    ids = prompts(size, given.prompts, size.max_position_embeddings - given.steps, device)
    row: dict[str, Any] = {"target": target, "dtype": str(dtype), "logits": []}
    texts = [ids, *(ids[:1, :rows] for rows in ROWS)]
    for some, move in zip(texts, moved(here, texts, dtype), strict=True):
        apart, allowed = float((there(some).double() - here(some).double()).abs().max()), 2 * move
        row["logits"].append(
            {"rows": some.numel(), "apart": apart, "allowed": allowed, "within": apart <= allowed}
        )
    allowed = row["logits"][0]["allowed"]
    # What the target did not take, or takes more slowly, is the reference compared with itself.
    row["not_taken"] = [str(miss) for miss in bf.report(there).misses]
    row["said"] = sorted({str(one.message) for one in said if issubclass(one.category, UserWarning)})
    row["differences"] = []
    for number, prompt in enumerate(ids):
        ours, theirs = (greedy(model, prompt[None], given.steps) for model in (there, here))
        differs = (ours != theirs)[0].nonzero()
        if len(differs):
            at = int(differs[0])
            top = here(theirs[:, :at])[0, -1].double().topk(2).values
            margin = float(top[0] - top[1])
            row["differences"].append(
                {"prompt": number, "token": at - prompt.numel(), "margin": margin, "tie": margin <= allowed}
            )
    row["same_tokens"] = (
        f"{len(ids) - len(row['differences'])} of {len(ids)} prompts, {given.steps} tokens each"
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--config", type=Path, default=FOLDER / "config.json")
    parser.add_argument("--target", action="append", choices=("cpu", "cuda"), help="may be repeated")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--out", type=Path, default=RESULTS / "qat-targets.json")
    given = parser.parse_args()
    config = json.loads(given.config.read_text(encoding="utf-8"))
    size = Size(**{name: config[name] for name in Size.__dataclass_fields__})
    rows = [compare(given.file, size, target, given) for target in given.target or ["cpu"]]
    write(given.out, {"torch": torch.__version__, "file": given.file.name, "rows": rows})
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
