"""Training the small decoder on rounded numbers: perplexity in floats, rounded, by algorithms, and trained.

In: the decoder of small_llama.py and its texts (corpus.py makes them). Out: a JSON with the perplexity of the
same held-back tokens for each format and seed, with mean, spread and what was won back; loss curves.

    python benchmarks/qat_lm.py --data out/lm --processes 12      on a GPU: results/qat-lm-<card>.{json,png}
    python benchmarks/qat_lm.py --tiny --steps 3 --out out/try    on a CPU, random tokens: to try the script
    python benchmarks/qat_lm.py --draw results/qat-lm-<card>.json    the curves alone (they need matplotlib)

Rounded and trained models start at the file's. What trains learns to say what the file's model says (the
divergence from its predictions, `--task` adds the text's own loss), at each of `--rates` with the first seed;
the rate whose validation text is best is taken for the others. "float" is the better of the file's model and
one that goes on training in floats in the same way on the text's own loss. Algorithms are those of ptq.py;
of several the one that validation prefers. The share won back is of the loss, in nats a token.
"""

from __future__ import annotations

import argparse
import copy
import math
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from qat_lm_train import Bench, judged, trained
from qat_report import RESULTS, Curve, card, draw, spread, won_back, write

import bitfold as bf
from bitfold.passes.rules import Rule

FORMATS = {
    "int4[g128]": ("int4[g128]", ""),
    "int4[g32]": ("int4[g32]", ""),
    "int3[g32]": ("int3[g32]", ""),
    "int2[g32]": ("int2[g32]", ""),
    "mxfp4": ("mxfp4", ""),
    "nvfp4": ("nvfp4", ""),
    "int4[g32] x int8": ("int4[g32]", "int8"),
}
FLOAT = "float"
ALGORITHMS = ("clip,gptq,descend,refit", "clip")


def recipe(name: str) -> bf.Recipe:
    """Linears but the head: weights in one format, activations in another or as floats."""
    weight, activation = FORMATS[name]
    return bf.Recipe("qat", (Rule(weight=weight, input=activation),))


def floats(bench: Bench) -> dict[str, Any]:
    """The file's model, and the model that goes on training in floats."""
    found: dict[str, Any] = {"file": judged(bench.model, bench)}
    runs, curves, rate = _seeds(bench, lambda: copy.deepcopy(bench.model))
    return found | {"rate": rate, "runs": [run["judged"] for run in runs], "curves": curves}


def training(bench: Bench, name: str) -> dict[str, Any]:
    """Rounding alone, and training with each seed."""
    given, what = bench.given, recipe(name)
    how = bf.Qat(given.gradient, given.activation)
    plain = bf.quantize(copy.deepcopy(bench.model), what, target="reference")
    save = given.out / "qat-lm-int4.safetensors" if given.save and name == "int4[g32]" else None
    runs, curves, rate = _seeds(bench, lambda: bf.prepare_qat(copy.deepcopy(bench.model), what, how), save)
    return {
        "gradient": str(how.weight),
        "rounded": judged(plain, bench),
        "rate": rate,
        "runs": [run["judged"] for run in runs],
        "converted_equal": all(run["equal"] for run in runs),
        "compiled": all(run["compiled"] for run in runs),
        "seconds": [run["seconds"] for run in runs],
        "curves": curves,
    }


def algorithms(bench: Bench, name: str) -> dict[str, Any]:
    """Every algorithm after the fact, from windows of the training text."""
    batches = [(piece,) for piece in bench.texts.calibration(bench.given.calibration).split(4)]
    found = {}
    for text in ALGORITHMS:
        model = copy.deepcopy(bench.model)
        bf.quantize(model, recipe(name), algorithm=text, calibration=batches, target="reference")
        found[text] = judged(model, bench)
    return {"algorithms": found}


def _seeds(
    bench: Bench, prepare: Any, save: Path | None = None
) -> tuple[list[dict[str, Any]], list[list[float]], float]:
    """The first seed at every rate, the others at the best; no run is begun that would end too late."""
    given, tried, longest = bench.given, dict[float, dict[str, Any]](), 0.0
    for rate in given.rates:
        tried[rate] = trained(prepare(), bench, 0, rate, save)
        longest = max(longest, tried[rate]["seconds"])
        if time.time() + longest > given.until:
            break
    best = min(tried, key=lambda rate: float(tried[rate]["judged"]["validation"]))
    runs = [tried[best]]
    for seed in range(1, given.seeds):
        if time.time() + longest > given.until:
            print(f"no time left for seed {seed}", flush=True)
            break
        runs.append(trained(prepare(), bench, seed, best))
    return runs, [run["curve"] for run in runs], best


def task(given: argparse.Namespace, kind: str, name: str) -> dict[str, Any]:
    """One task, in a process of its own or in this one."""
    bench = Bench(given)
    if kind == FLOAT:
        return floats(bench)
    return training(bench, name) if kind == "training" else algorithms(bench, name)


def measure(given: argparse.Namespace, path: Path) -> dict[str, Any]:
    """All tasks; the file is written after each, so that an interrupted run has what it had."""
    names = given.formats.split(";") if given.formats else list(FORMATS)
    tasks = [(FLOAT, ""), *(("training", name) for name in names)]
    tasks += [("algorithms", name) for name in names] if given.algorithms else []
    options = {name: str(value) for name, value in vars(given).items()}
    found: dict[str, Any] = {"torch": torch.__version__, "card": card(), "options": options}
    found |= {FLOAT: {}, "formats": {name: {} for name in names}, "failed": {}}

    def done(kind: str, name: str, row: dict[str, Any]) -> None:
        (found[FLOAT] if kind == FLOAT else found["formats"][name]).update(row)
        found["summary"] = summary(found)
        write(path, found)
        print(kind, name, {key: value for key, value in row.items() if key != "curves"}, flush=True)

    if given.processes == 1:
        for kind, name in tasks:
            done(kind, name, task(given, kind, name))
        return found
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(given.processes, mp_context=fresh) as pool:
        waiting = {pool.submit(task, given, *one): one for one in tasks}
        for future in as_completed(waiting):
            error = future.exception()
            if error is None:
                done(*waiting[future], future.result())
                continue
            found["failed"][" ".join(waiting[future])] = f"{type(error).__name__}: {error}"
            write(path, found)
            print(*waiting[future], "failed:", found["failed"][" ".join(waiting[future])], flush=True)
    return found


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Perplexities of the test text: float, and for each format rounded, by the best algorithm, trained."""
    if not found[FLOAT]:
        return {}
    longer = spread([run["test"] for run in found[FLOAT]["runs"]])
    base = min(found[FLOAT]["file"]["test"], longer[0])
    rows: dict[str, Any] = {FLOAT: {"file": found[FLOAT]["file"]["test"], "longer": longer, "base": base}}
    for name, row in found["formats"].items():
        if "runs" not in row:
            continue
        mean, deviation = spread([run["test"] for run in row["runs"]])
        rounded = row["rounded"]["test"]
        rows[name] = {
            "rounded": rounded,
            "trained": [mean, deviation],
            "seeds": len(row["runs"]),
            "recovered": won_back(math.log(base), math.log(rounded), math.log(mean)),
        }
        if "algorithms" in row:
            best = min(row["algorithms"], key=lambda text: row["algorithms"][text]["validation"])
            solved = row["algorithms"][best]["test"]
            rows[name] |= {"algorithm": best, "solved": solved}
            rows[name]["solved_recovered"] = won_back(math.log(base), math.log(rounded), math.log(solved))
    return rows


def table(rows: dict[str, Any]) -> str:
    """The summary in Markdown."""
    if not rows:
        return ""
    lines = [
        f"Float {rows[FLOAT]['base']:.3f}.",
        "",
        "| format | rounded | best algorithm | won back | trained | won back |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        if name == FLOAT:
            continue
        solved = f"{row['solved']:.3f} (`{row['algorithm']}`)" if "solved" in row else ""
        mean, deviation = row["trained"]
        shares = [_percent(row.get("solved_recovered")), _percent(row["recovered"])]
        lines.append(
            f"| {name} | {row['rounded']:.3f} | {solved} | {shares[0]} | {mean:.3f} ± {deviation:.3f} | "
            f"{shares[1]} |"
        )
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}%"


def curves(found: dict[str, Any]) -> list[Curve]:
    """What was learned from, with the first seed, for each format."""
    return [Curve(name, 0, row["curves"][0]) for name, row in found["formats"].items() if row.get("curves")]


def main() -> None:
    given = _arguments()
    if given.draw is not None:
        import json

        _draw(json.loads(given.draw.read_text(encoding="utf-8")), given.draw.with_suffix(".png"))
        return
    given.until = time.time() + given.seconds
    path = given.out / f"qat-lm-{card()}.json"
    found = measure(given, path)
    if not curves(found):
        raise SystemExit(f"nothing was trained: {found['failed']}")
    print(table(found.get("summary", {})))
    try:
        _draw(found, path.with_suffix(".png"))
    except ModuleNotFoundError as error:
        print(f"{error}; draw later: python benchmarks/qat_lm.py --draw {path}")


def _draw(found: dict[str, Any], path: Path) -> None:
    draw(curves(found), path, "step", "training loss (nats a token)", every=20)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("out/lm"))
    parser.add_argument("--model", default="", help="a folder (default: the one in the repository)")
    parser.add_argument("--tiny", action="store_true", help="random weights and tokens")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--rates", type=lambda text: [float(one) for one in text.split(",")], default=[1e-4, 5e-4]
    )
    parser.add_argument("--scale-rate", type=float, default=0.1, help="of learned scales, times the rate")
    parser.add_argument("--task", type=float, default=0.0, help="weight of the text's own loss")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=0, help="of each text to judge by; 0: all")
    parser.add_argument("--calibration", type=int, default=128, help="windows for the algorithms")
    parser.add_argument("--gradient", default="lsq")
    parser.add_argument("--activation", default="clip")
    parser.add_argument("--no-algorithms", dest="algorithms", action="store_false")
    parser.add_argument("--formats", default="", help="some of the formats, with ; between them")
    parser.add_argument("--processes", type=int, default=1, help="at a time, on one card")
    parser.add_argument("--seconds", type=float, default=1e6, help="no run is begun that would end later")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--save", action="store_true", help="write the int4[g32] model, for qat_targets.py")
    parser.add_argument("--draw", type=Path, help="only the curves of this JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
