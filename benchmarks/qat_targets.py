"""A model that was trained on rounded numbers, from its file, on a target: the logits and the tokens it says.

In: a file that qat_lm.py wrote (`--save`). Out: for each target a line of JSON: how far logits are from the
reference target's, how far they may be, and whether greedy decoding says the same tokens.

    python benchmarks/qat_targets.py out/qat-lm-int4.safetensors --target cpu          float32
    python benchmarks/qat_targets.py out/qat-lm-int4.safetensors --target cuda         on a GPU: bfloat16

How far they may be: every linear's result may be off by its derived bound (lowering/tolerance.py, from K and
the dtype). What that does to the logits is computed in float64 by moving every result by all of its bound,
up or down at random; the tolerance is twice the largest difference of several draws, since both targets may
be off. Where tokens differ first, the margin between the reference's two likeliest
tokens is given; below the tolerance it is a tie that rounding decides.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from qat_report import RESULTS, write
from small_llama import FOLDER, Size, SmallLlama
from torch import Tensor, nn

import bitfold as bf
from bitfold.lowering.tolerance import bound

DRAWS = 8


def skeleton(size: Size, dtype: torch.dtype, device: str) -> SmallLlama:
    return SmallLlama(size).to(device, dtype).eval()


def prompts(size: Size, count: int, length: int, device: str) -> Tensor:
    """Random tokens: a model's numbers, not its words, are what is compared."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(size.vocab_size, (count, length), generator=draw).to(device)


def moved(model: SmallLlama, ids: Tensor, dtype: torch.dtype) -> float:
    """The largest that logits move when every linear's result moves by its bound; in float64."""
    exact = SmallLlama(model.size).to(ids.device, torch.float64).eval()
    exact.load_state_dict(_floats(model), strict=False)
    exact.lm_head.weight = exact.model.embed_tokens.weight
    draw = torch.Generator(ids.device).manual_seed(0)

    def off(module: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> Tensor:
        most = bound(args[0], module.weight.detach(), None, dtype)  # type: ignore[arg-type]
        signs = torch.randint(2, result.shape, generator=draw, device=ids.device) * 2 - 1
        return result + signs * most

    still = exact(ids)
    handles = [m.register_forward_hook(off) for m in exact.modules() if isinstance(m, nn.Linear)]
    worst = max(float((exact(ids) - still).abs().max()) for _ in range(DRAWS))
    for handle in handles:
        handle.remove()
    return worst


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
    apart = float((there(ids).double() - here(ids).double()).abs().max())
    allowed = 2 * moved(here, ids, dtype)
    row: dict[str, Any] = {"target": target, "dtype": str(dtype), "logits_apart": apart, "allowed": allowed}
    row["within"] = apart <= allowed
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
