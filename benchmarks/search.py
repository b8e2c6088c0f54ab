"""`bf.search` on the small decoder: its recipes against those of one format of the same size, and in time.

In: the committed model and token ids (corpus.py). Out: a JSON, a plot of the front beside it, and a table.

    python benchmarks/search.py --data out/lm --out benchmarks/results/search-cpu.json
    python benchmarks/search.py --seconds --wide --out ...           predicted times against measured

Every layer is rounded alone in every format on windows of the training text (or its loss estimated by
traces), and recipes are judged on the validation text: for each format, the recipe of the size that this
format has everywhere, with plain rounding in both. Time: budgets between the fastest and the slowest recipe,
each recipe run on one batch and its time held against what the table of layers adds up to.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ptq_numbers import perplexity
from small_llama import FOLDER, Size, SmallLlama, load
from text_windows import windows
from torch import Tensor

import bitfold as bf
from bitfold.lowering.outputs import divergence
from bitfold.lowering.search.integer_program import bits_of, fewest_losses_in_time, pareto
from bitfold.lowering.search.sensitivity import Choice, Sensitivity, sensitivity
from bitfold.lowering.search.times import measure_times
from bitfold.lowering.search.trace import trace_sensitivity
from bitfold.passes.recipes import Recipe
from bitfold.tools.demo import environment
from bitfold.tools.plots import search_front

FORMATS = ("int6[g64]", "int4[g32]", "int4[g128]", "int3[g32]", "int2[g32]")
UNIFORM = FORMATS[1:4]
# 67 million weights in linears: more than caches hold, so that a format's bytes are its time.
WIDE = Size(
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=6,
    num_attention_heads=16,
    num_key_value_heads=4,
)
TIMED = ("int8[g64]", "int4[g64]", "int2[g64]")


def judged(model: Any, exact: Any, recipe: Recipe, text: Tensor) -> tuple[float, float]:
    """Perplexity and divergence of the model in a recipe, by plain rounding."""
    q = bf.quantize(copy.deepcopy(model), recipe, target="reference")
    losses, apart = [], 0.0
    with torch.no_grad():
        for ids in text.split(16):
            before, after = exact(ids), q(ids)
            found = after[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            losses.append(-found.double().mean(-1))
            apart += float(divergence(before, after)) * len(ids) / len(text)
    return perplexity(torch.cat(losses)), apart


def uniform(table: Sensitivity, text: str) -> list[Choice]:
    """The choices of one format, of the layers that it fits."""
    return [choice for choice in table.choices if choice.format == text]


def sizes(given: argparse.Namespace, model: Any, record: dict[str, Any]) -> None:
    data = [(piece,) for piece in windows(given.data, "train", given.windows).split(8)]
    text = windows(given.data, "validation", given.judge)
    record["asked"] = {"windows": given.windows, "judge": given.judge, "formats": list(FORMATS)}
    tables = {}
    for name, make in (("measured", sensitivity), ("trace", trace_sensitivity)):
        parts = [_kept(given, f"{name}, {fmt}", partial(make, model, data, (fmt,))) for fmt in FORMATS]
        choices = [Choice(**choice) for part in parts for choice in part["choices"]]
        numel = {layer: count for part in parts for layer, count in part["numel"].items()}
        tables[name] = Sensitivity(tuple(choices), numel)
        record["seconds"][name] = round(sum(part["seconds"] for part in parts), 1)
    points = {}
    for fmt in UNIFORM:
        chosen = uniform(tables["measured"], fmt)
        left_out = set(tables["measured"].numel) - {choice.layer for choice in chosen}
        if left_out:
            print(f"{fmt}: no row, since it does not fit {', '.join(sorted(left_out))}", flush=True)
            continue
        bits = bits_of(tables["measured"], chosen)
        points[fmt] = bits, sum(choice.loss for choice in chosen)
        row = {"format": fmt, "bits": bits, "uniform": judged(model, model, Recipe.parse(fmt), text)}
        for name, table in tables.items():
            recipe = bf.search(model, data, budget=f"{bits + 1e-6:.6f} bits", table=table)
            row[name] = judged(model, model, recipe, text)
            row[f"recipe, {name}"] = recipe.to_dict()
        record["rows"].append(row)
        shown = ", ".join(
            f"{way} {row[way][0]:.4f} ({1e3 * row[way][1]:.2f})" for way in ("uniform", *tables)
        )
        print(f"{fmt:12} {bits:.3f} bits: {shown}", flush=True)
    record["front"] = pareto(tables["measured"])
    record["points"] = points
    if given.out:
        search_front(record["front"], points, Path(given.out).with_suffix(".png"))


def _kept(given: argparse.Namespace, name: str, make: Callable[[], Sensitivity]) -> dict[str, Any]:
    """One format's table: made, or read from the folder of an earlier run that was interrupted."""
    path = None if given.keep is None else Path(given.keep) / f"{name}.json"
    if path is not None and path.exists():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    began = time.perf_counter()
    table = make()
    taken = time.perf_counter() - began
    made = {"seconds": taken, "choices": [asdict(one) for one in table.choices], "numel": table.numel}
    print(f"{name}: {taken:.0f} s", flush=True)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(made), encoding="utf-8")
    return made


def seconds(given: argparse.Namespace, model: Any, record: dict[str, Any]) -> None:
    """Recipes for times, predicted and measured, on the CPU target. They are run in turns, a call of each
    after the other, so that what the machine does meanwhile is the same for all."""
    model, batch = _timed_model(given, model)
    record["asked"] = {"model": type(model).__name__, "tokens": list(batch.shape)}
    began = time.perf_counter()
    times = measure_times(model, [batch], TIMED, repeats=15)
    table = trace_sensitivity(model, [(batch,)], TIMED, draws=1)
    record["seconds"]["times"] = round(time.perf_counter() - began, 1)
    spans = [[times.of(c.layer, c.format) for c in table.of(layer)] for layer in table.numel]
    ends = [times.rest + sum(map(pick, spans)) for pick in (min, max)]
    made = []
    for share in (0.1, 0.5, 0.9):
        budget = ends[0] + share * (ends[1] - ends[0])
        chosen = fewest_losses_in_time(table, times, budget)
        counts = dict(Counter(choice.format for choice in chosen))
        row = {"budget": budget, "predicted": times.total(chosen), "layers": counts}
        made.append((row, bf.quantize(copy.deepcopy(model), table.recipe(chosen, "timed")), []))
    with torch.inference_mode():
        for _ in range(24):
            for _, q, found in made:
                start = time.perf_counter()
                q(batch)
                found.append(time.perf_counter() - start)
    for row, _, found in made:
        row["measured"] = statistics.median(found[4:])
        record["times"].append(row)
        off = row["predicted"] / row["measured"] - 1
        print(
            f"{1e3 * row['budget']:.2f} ms: predicted {1e3 * row['predicted']:.2f}, "
            f"measured {1e3 * row['measured']:.2f} ({off:+.1%})  {row['layers']}",
            flush=True,
        )


def _timed_model(given: argparse.Namespace, model: Any) -> tuple[Any, Tensor]:
    """The model whose layers are timed, and a batch of it."""
    if not given.wide:
        return model, windows(given.data, "validation", 1)[:, : given.tokens]
    torch.manual_seed(0)
    return SmallLlama(WIDE).eval(), torch.randint(WIDE.vocab_size, (1, given.tokens))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(FOLDER))
    parser.add_argument("--data", default="out/lm")
    parser.add_argument("--windows", type=int, default=16, help="of training text, to measure layers on")
    parser.add_argument("--judge", type=int, default=128, help="of validation text")
    parser.add_argument("--seconds", action="store_true", help="predicted times against measured ones, alone")
    parser.add_argument("--wide", action="store_true", help="time a wider model, of random weights, instead")
    parser.add_argument("--tokens", type=int, default=16, help="of the batch that is timed")
    parser.add_argument("--keep", help="a folder for tables, so that an interrupted run goes on")
    parser.add_argument("--out", help="a JSON file")
    given = parser.parse_args()
    model = None if given.wide else load(given.model)
    record: dict[str, Any] = {
        "where": environment(torch.device("cpu")),
        "seconds": {},
        "rows": [],
        "times": [],
    }
    (seconds if given.seconds else sizes)(given, model, record)
    if given.out:
        beside = Path(given.out).with_suffix(".part")
        beside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        beside.replace(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
