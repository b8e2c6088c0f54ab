"""Training the small decoder on rounded numbers: perplexity in floats, rounded, and trained rounded.

In: the decoder of small_llama.py and its texts (corpus.py makes them). Out: a JSON with perplexity on the
same held-back tokens for each format and seed, with mean, spread and what was won back; curves as PNG.

    python benchmarks/qat_lm.py --data out/lm                   on a GPU: results/qat-lm-<card>.{json,png}
    python benchmarks/qat_lm.py --tiny --steps 3 --seeds 1 --out out/try   on a CPU, random tokens: to try it

"float" goes on training for as many steps as the rounded ones, on the same batches at the same rates, or is
the file's model as it is, whichever is better; the loss that training has to win back is counted from there.
The teacher is the file's model. Algorithms that round better are measured by ptq.py.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bitfold as bf
from bitfold.passes.rules import Rule

RESULTS = Path(__file__).parent / "results"
FORMATS = {
    "int4[g128]": ("int4[g128]", ""),
    "int4[g32]": ("int4[g32]", ""),
    "int3[g32]": ("int3[g32]", ""),
    "int2[g32]": ("int2[g32]", ""),
    "mxfp4": ("mxfp4", ""),
    "nvfp4": ("nvfp4", ""),
    "int4[g32] x int8": ("int4[g32]", "int8"),
}


class Texts:
    """Windows of token ids: random ones to train on, fixed ones to judge by."""

    def __init__(self, given: argparse.Namespace, length: int, vocabulary: int, device: torch.device) -> None:
        self.length, self.device = length, device
        if given.tiny:
            draw = np.random.default_rng(0)
            self.train, test = (draw.integers(0, vocabulary, size).astype(np.int64) for size in (4096, 1024))
        else:
            self.train, test = (
                np.load(given.data / f"{split}.npy").astype(np.int64) for split in ("train", "test")
            )
        count = min(len(test) // length, given.windows)
        self.test = torch.from_numpy(test[: count * length].reshape(count, length)).to(device)

    def batch(self, draw: np.random.Generator, size: int) -> Tensor:
        starts = draw.integers(0, len(self.train) - self.length, size)
        rows = np.stack([self.train[start : start + self.length] for start in starts])
        return torch.from_numpy(rows).to(self.device)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean negative log likelihood of every token but the first."""
    return F.cross_entropy(model(ids)[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: nn.Module, texts: Texts) -> float:
    """Over the same tokens for every model, in evaluation mode."""
    model.eval()
    losses = [loss_of(model, ids).double().item() * len(ids) for ids in texts.test.split(16)]
    return math.exp(sum(losses) / len(texts.test))


def train(model: nn.Module, texts: Texts, given: argparse.Namespace, seed: int) -> list[float]:
    """The loss of each step. Weights float32, products bfloat16 by autocast on a GPU."""
    draw = np.random.default_rng(seed)
    groups = bf.parameter_groups(model, given.rate, given.rate / 10, weight_decay=0.0)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    warm = max(given.steps // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * min(step / given.steps, 1.0))),
    )
    cuda = texts.device.type == "cuda"
    teaches = "bitfold_teacher" in model.__dict__
    step_of = torch.compile(model) if cuda else model
    curve = []
    model.train()
    for _ in range(given.steps):
        ids = texts.batch(draw, given.batch)
        with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
            loss = loss_of(step_of, ids)
            total = loss + bf.distillation(model) if teaches else loss
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        curve.append(loss.item())
    return curve


def load(given: argparse.Namespace) -> Any:
    """The decoder of small_llama.py, from its file, or a tiny one with random weights."""
    from small_llama import Size, SmallLlama
    from small_llama import load as read

    if not given.tiny:
        return read()
    torch.manual_seed(0)
    small = Size(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    return SmallLlama(small).eval()


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Every format and seed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load(given).to(device)
    texts = Texts(given, model.size.max_position_embeddings, model.size.vocab_size, device)
    found: dict[str, Any] = {"file": perplexity(model, texts), "float": [], "formats": {}}
    for seed in range(given.seeds):
        longer = copy.deepcopy(model)
        train(longer, texts, given, seed)
        found["float"].append(perplexity(longer, texts))
    base = min(found["file"], *found["float"])
    for name in given.formats.split(";") if given.formats else FORMATS:
        weight, activation = FORMATS[name]
        recipe = bf.Recipe("qat", (Rule(weight=weight, input=activation),))
        plain = bf.quantize(copy.deepcopy(model), recipe, target="reference")
        row: dict[str, Any] = {"rounded": perplexity(plain, texts), "trained": [], "curves": []}
        for seed in range(given.seeds):
            trainee = copy.deepcopy(model)
            distill = bf.Distill(weight=given.distill) if given.distill else None
            bf.prepare_qat(trainee, recipe, bf.Qat(given.gradient, given.activation), distill=distill)
            row["curves"].append(train(trainee, texts, given, seed))
            before = perplexity(trainee, texts)
            bf.convert(trainee, target="reference")
            row["trained"].append(perplexity(trainee, texts))
            row["converted_equal"] = row.get("converted_equal", True) and row["trained"][-1] == before
        lost = math.log(row["rounded"]) - math.log(base)
        won = math.log(row["rounded"]) - math.log(statistics.fmean(row["trained"]))
        row["mean"], row["spread"] = statistics.fmean(row["trained"]), statistics.pstdev(row["trained"])
        row["recovered"] = won / lost if lost > 0 else None
        found["formats"][name] = row
        print(name, {key: value for key, value in row.items() if key != "curves"}, flush=True)
    return found


def draw(found: dict[str, Any], path: Path) -> None:
    """Loss curves of the first seed, a mean over every 20 steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, row in found["formats"].items():
        curve = row["curves"][0]
        means = [statistics.fmean(curve[i : i + 20]) for i in range(0, len(curve), 20)]
        axes.plot(range(0, len(curve), 20), means, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (nats a token)")
    axes.legend(fontsize=8)
    figure.tight_layout()
    beside = path.with_suffix(".part.png")
    figure.savefig(beside, dpi=120)
    beside.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("out/lm"))
    parser.add_argument("--tiny", action="store_true", help="random weights and tokens")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=512)
    parser.add_argument("--gradient", default="lsq")
    parser.add_argument("--activation", default="clip")
    parser.add_argument(
        "--distill", type=float, default=1.0, help="weight of the teacher's loss; 0: no teacher"
    )
    parser.add_argument("--formats", default="", help="some of the formats, with ; between them")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    found = measure(given)
    card = torch.cuda.get_device_name().lower().replace(" ", "-") if torch.cuda.is_available() else "cpu"
    options = {name: str(value) for name, value in vars(given).items()}
    given.out.mkdir(parents=True, exist_ok=True)
    beside = given.out / f"qat-lm-{card}.part.json"
    beside.write_text(
        json.dumps({"torch": torch.__version__, "card": card, "options": options, **found}, indent=1)
    )
    beside.replace(given.out / f"qat-lm-{card}.json")
    draw(found, given.out / f"qat-lm-{card}.png")


if __name__ == "__main__":
    main()
