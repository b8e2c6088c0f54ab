"""Training on rounded numbers: what it wins back of what rounding loses, on handwritten digits.

In: nothing (digits of 8 x 8 pixels come with scikit-learn), or a folder of MNIST's files (`qat_images.py`
says where they come from). Out: a JSON with accuracy and loss of the float model, of rounding alone and of
training, for each recipe and seed; curves as PNG.

    python benchmarks/qat.py                                     six seeds: results/qat-digits.{json,png}
    python benchmarks/qat.py --mnist DIR --seeds 3 --epochs 3    70,000 images of 28 x 28: results/qat-mnist.*
    python benchmarks/qat.py --validate --out out/choice         judged on 297 images taken from the training
    python benchmarks/qat.py --seeds 1 --epochs 2 --out out/try  to try the script

The classifier is a small convolutional network with batch norm, trained as a program, so that batch norm is
folded. It is trained in floats for some epochs; from there it goes on for as many again, in floats and, for
each recipe, on rounded numbers, with the same batches and rates; from the middle of that on batch norm
normalizes by its running statistics, in floats too. That, the gradients and the rates were chosen with
`--validate`. "float" is the former, "rounded" the former folded and rounded after the fact, "trained" the
latter, converted, on the reference target; all of it on images that nothing else has seen (600, or MNIST's
test set). Recovery is of the loss: (rounded - trained) / (rounded - float).
"""

from __future__ import annotations

import argparse
import copy
import platform
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from qat_images import Images, digits, mnist, validation
from qat_report import RESULTS, Curve, device_word, draw, spread, won_back, write
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

import bitfold as bf
from bitfold.passes import Pipeline
from bitfold.passes.annotate import Annotate
from bitfold.passes.batch_norm import FoldBatchNorm
from bitfold.passes.fold import Fold
from bitfold.passes.observing.calibrate import calibrate
from bitfold.passes.observing.observe import Observe
from bitfold.passes.rules import Rule


def recipe(name: str, weight: str, activation: str) -> bf.Recipe:
    """Every layer: weights in one format, activations with one calibrated scale a tensor, or as floats."""
    observer = "minmax" if activation else ""
    rule = Rule(op="*", weight=weight, input=activation, observer=observer)
    return bf.Recipe(name, (rule,))


RECIPES = {
    "int8, int8 activations": (recipe("int8", "int8", "int8[tensor]"), bf.Qat()),
    "int4": (recipe("int4", "int4", ""), bf.Qat("lsq")),
    "int2": (recipe("int2", "int2", ""), bf.Qat("lsq")),
}


class Classifier(nn.Module):
    """Three convolutions with batch norm, and a linear: 26 thousand parameters."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 16, 32, 64)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
            x = F.max_pool2d(x, 2) if x.shape[-1] > 2 else x
        return self.head(x.mean((2, 3)))


def train(
    model: nn.Module, data: Images, epochs: int, rate: float, seed: int, freeze: int | None = None
) -> list[float]:
    """The loss of each epoch. freeze: the epoch from which a float model's batch norm stands still; one that
    is prepared knows its own."""
    images, labels = data.images, data.labels
    torch.manual_seed(seed)
    groups = bf.parameter_groups(model, rate, rate / 10, weight_decay=1e-4)
    optimizer = torch.optim.AdamW(groups)
    steps = epochs * -(-len(images) // data.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    curve = []
    for epoch in range(epochs):
        total = 0.0
        if freeze is not None and epoch >= freeze:
            for module in model.modules():
                module.train(not isinstance(module, nn.BatchNorm2d))
        for batch in torch.randperm(len(images)).to(images.device).split(data.batch):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if isinstance(model, GraphModule):
                bf.advance(model)
            total += loss.item() * len(batch)
        curve.append(total / len(images))
    return curve


@torch.no_grad()
def judge(model: nn.Module, data: Images) -> dict[str, float]:
    """Accuracy in percent and cross entropy on the images held back."""
    logits = said(model, data.held)
    right = (logits.argmax(1) == data.held_labels).double().mean()
    return {"accuracy": 100 * float(right), "loss": float(F.cross_entropy(logits, data.held_labels))}


@torch.no_grad()
def said(model: nn.Module, images: Tensor) -> Tensor:
    """Logits, of a few images at a time."""
    return torch.cat([model(some) for some in images.split(1000)])


def rounded(model: nn.Module, what: bf.Recipe, data: Images) -> nn.Module:
    """Rounding alone: batch norm folded, ranges from the same calibration."""
    gm = bf.capture(model, (data.images[:64],), dynamic="batch")
    Pipeline([FoldBatchNorm(), Annotate(str(what))]).run(gm)
    if what.calibrated:
        Pipeline([Observe()]).run(gm)
        calibrate(gm, [data.images[:256]])
    Pipeline([Fold()]).run(gm)
    return gm


def one_seed(seed: int, epochs: int, data: Images) -> dict[str, Any]:
    """Every recipe from one float model."""
    torch.manual_seed(seed)
    model = Classifier().train().to(data.images.device)
    curve = train(model, data, epochs, 3e-3, seed)
    longer = copy.deepcopy(model)
    middle = epochs // 2
    curve += train(longer, data, epochs, 1e-3, seed, freeze=middle)
    longer.eval()
    found: dict[str, Any] = {"seed": seed, "float": judge(longer, data), "float_curve": curve, "recipes": {}}
    for name, (what, how) in RECIPES.items():
        trainee = copy.deepcopy(model).train()
        start = time.perf_counter()
        gm = bf.prepare_qat(
            trainee,
            what,
            replace(how, freeze_norm=middle * -(-len(data.images) // data.batch)),
            scope="program",
            dynamic="batch",
            calibration=_batches(what, data),
            example_inputs=(data.images[:64],),
        )
        curve = train(gm, data, epochs, 1e-3, seed)
        gm.eval()
        expected = said(gm, data.held)
        converted = bf.convert(gm, target="reference")
        equal = torch.equal(said(converted, data.held), expected)
        found["recipes"][name] = {
            "recipe": what.to_dict(),
            "gradient": str(how.weight),
            "rounded": judge(rounded(longer, what, data), data),
            "trained": judge(converted, data),
            "converted_equal": equal,
            "curve": curve,
            "seconds": round(time.perf_counter() - start, 1),
        }
        print(
            seed,
            name,
            found["recipes"][name]["rounded"],
            found["recipes"][name]["trained"],
            equal,
            flush=True,
        )
    return found


def _batches(what: bf.Recipe, data: Images) -> list[Tensor] | None:
    return [data.images[:256]] if what.calibrated else None


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds, and what training won back."""

    def rounded_spread(values: list[float]) -> list[float]:
        return [round(value, 4) for value in spread(values)]

    rows: dict[str, Any] = {
        "float": {k: rounded_spread([run["float"][k] for run in runs]) for k in ("accuracy", "loss")}
    }
    for name in RECIPES:
        row: dict[str, Any] = {}
        for state in ("rounded", "trained"):
            row[state] = {
                k: rounded_spread([run["recipes"][name][state][k] for run in runs])
                for k in ("accuracy", "loss")
            }
        means = (rows["float"]["loss"][0], row["rounded"]["loss"][0], row["trained"]["loss"][0])
        won = won_back(*means)
        row["recovered"] = None if won is None else round(won, 3)
        row["converted_equal"] = all(run["recipes"][name]["converted_equal"] for run in runs)
        rows[name] = row
    return rows


def curves(runs: list[dict[str, Any]]) -> list[Curve]:
    """Losses of the first seed."""
    run = runs[0]
    epochs = len(run["float_curve"]) // 2
    trained = [Curve(name, epochs, one["curve"]) for name, one in run["recipes"].items()]
    return [Curve("float", 0, run["float_curve"]), *trained]


def table(rows: dict[str, Any]) -> str:
    """The summary in Markdown."""
    lines = [
        "| | accuracy, % | loss | of the loss won back |",
        "| --- | --- | --- | --- |",
        f"| float | {_cell(rows['float'], 'accuracy')} | {_cell(rows['float'], 'loss')} | |",
    ]
    for name in RECIPES:
        row = rows[name]
        for state in ("rounded", "trained"):
            won = (
                f"{100 * row['recovered']:.0f}%"
                if state == "trained" and row["recovered"] is not None
                else ""
            )
            cells = f"{_cell(row[state], 'accuracy')} | {_cell(row[state], 'loss')}"
            lines.append(f"| {name}, {state} | {cells} | {won} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any], key: str) -> str:
    mean, deviation = row[key]
    return f"{mean:.2f} ± {deviation:.2f}" if key == "accuracy" else f"{mean:.4f} ± {deviation:.4f}"


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--mnist", type=Path, help="a folder of MNIST's four files")
    parser.add_argument("--validate", action="store_true", help="judge on a part of the training images")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    data = mnist(given.mnist) if given.mnist else digits()
    data = (validation(data) if given.validate else data).to(device())
    runs = [one_seed(seed, given.epochs, data) for seed in range(given.seeds)]
    rows = summary(runs)
    found = {
        "torch": torch.__version__,
        "processor": platform.machine(),
        "device": device_word(),
        "threads": torch.get_num_threads(),
        "epochs": given.epochs,
        "summary": rows,
        "runs": runs,
    }
    write(given.out / f"qat-{data.name}.json", found)
    draw(curves(runs), given.out / f"qat-{data.name}.png", "epoch", "training loss (cross entropy)")
    print(table(rows))


if __name__ == "__main__":
    main()
