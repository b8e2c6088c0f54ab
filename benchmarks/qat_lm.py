"""Training the small decoder on rounded numbers: perplexity in floats, rounded, by algorithms, and trained.

In: the decoder of small_llama.py and its texts (corpus.py makes them). Out: a JSON with the perplexity of
the same held-back tokens for each format and seed, with mean, spread and what was won back; loss curves.

    python benchmarks/qat_lm.py --data out/lm --processes 12      on a GPU: results/qat-lm-<card>.{json,png}
    python benchmarks/qat_lm.py --tiny --steps 3 --out out/try    on a CPU, random tokens: to try the script
    python benchmarks/qat_lm.py --draw results/qat-lm-<card>.json    the curves alone (they need matplotlib)
    python benchmarks/qat_lm.py --join results/qat-lm-<card>.json longer.json

The file's model still learns when it is trained on without dropout. So that what is measured is rounding
and not more training, it is first trained on in floats (`--base-steps`, at the rate that validation
prefers); that model is the base of all that follows, and the teacher. What trains on rounded numbers starts
at its weights and learns to say what it says (the divergence from its predictions; `--tasks` tries shares
of the text's own loss), at each of its rates with the first seed; what validation likes best is taken for
the others. "longer" is the base trained on in floats with the same steps, batches and choice of losses.
Algorithms are those of ptq.py; of several the one that validation prefers.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from queue import Empty
from typing import Any

import torch
from qat_lm_step import Steps
from qat_lm_table import FLOAT, curves, joined, summary, table
from qat_lm_train import Bench, judged, trained
from qat_report import RESULTS, device_word, draw, write
from safetensors.torch import save_file
from torch import nn

import bitfold as bf
from bitfold.passes.rules import Rule

# Weights, activations, and the rate: the fewer bits, the farther the weights have to go. Of 3e-5 and 1e-4
# (int3: 1e-4, 3e-4; int2: 3e-4, 1e-3) validation preferred these, after 1000 steps; --rates tries others.
FORMATS = {
    "int4[g128]": ("int4[g128]", "", (1e-4,)),
    "int4[g32]": ("int4[g32]", "", (1e-4,)),
    "int3[g32]": ("int3[g32]", "", (3e-4,)),
    "int2[g32]": ("int2[g32]", "", (3e-4,)),
    "mxfp4": ("mxfp4", "", (1e-4,)),
    "nvfp4": ("nvfp4", "", (1e-4,)),
    "int4[g32] x int8": ("int4[g32]", "int8", (1e-4,)),
}
BASE_RATES = (1e-4, 3e-4)
LONGER_RATES = (1e-5, 3e-5, 1e-4)
ALGORITHMS = ("clip,gptq", "clip,gptq,descend,refit")
SAVED = "int4[g32]"

Row = dict[str, Any]
Emit = Callable[[str, str, Row], None]


def recipe(name: str) -> bf.Recipe:
    """Linears but the head: weights in one format, activations in another or as floats."""
    weight, activation, _ = FORMATS[name]
    return bf.Recipe("qat", (Rule(weight=weight, input=activation),))


def base(bench: Bench, name: str, emit: Emit) -> None:
    """The file's model, and the model that all others begin with, which is written."""
    given, tried = bench.given, list[Row]()
    found: Row = {"file": judged(bench.model, bench)}
    best, kept = found["file"], bench.model
    if given.base_steps:
        steps = Steps(bench.floats(), None, bench)
        for rate in BASE_RATES:
            row = trained(steps, bench, 1000, rate, given.base_steps)  # a seed of its own
            if row["judged"]["validation"] < best["validation"]:
                best, kept = row["judged"], row["model"]
            tried.append({key: value for key, value in row.items() if key not in ("model", "curve")})
    beside = given.base.with_suffix(".part")
    save_file(
        {key: t.contiguous() for key, t in kept.state_dict().items() if key != "lm_head.weight"}, beside
    )
    beside.replace(given.base)
    emit(FLOAT, "", found | {"base_tried": tried, "base": best})


def longer(bench: Bench, name: str, emit: Emit) -> None:
    """The base, trained on in floats, and that rounded in each format."""

    def rounded(row: Row) -> None:
        for one in _names(bench.given):
            plain = bf.quantize(copy.deepcopy(row["model"]), recipe(one), target="reference")
            emit(one, "longer_rounded", {str(row["seed"]): judged(plain, bench)})

    _seeds(bench, bench.floats(), LONGER_RATES, lambda row: emit(FLOAT, "", row), rounded)


def training(bench: Bench, name: str, emit: Emit) -> None:
    """Rounding alone, and training with each seed."""
    given = bench.given
    how = bf.Qat(given.gradient, given.activation, start=given.start)
    plain = bf.quantize(bench.floats(), recipe(name), target="reference")
    emit(name, "", {"gradient": str(how.weight), "rounded": judged(plain, bench)})
    file = given.out / "qat-lm-int4.safetensors" if given.save and name == SAVED else None

    def save(row: Row) -> None:
        if file is not None and row["seed"] == 0:
            bf.save(row["model"], file)

    model = bf.prepare_qat(bench.floats(), recipe(name), how)
    _seeds(bench, model, given.rates or FORMATS[name][2], lambda row: emit(name, "", row), save)


def algorithms(bench: Bench, name: str, emit: Emit) -> None:
    """Every algorithm after the fact, from windows of the training text."""
    batches = [(piece,) for piece in bench.texts.calibration(bench.given.calibration).split(4)]
    for text in ALGORITHMS:
        if time.time() > bench.given.until:
            print(f"no time left for {text} on {name}", flush=True)
            break
        model = bench.floats()
        bf.quantize(model, recipe(name), algorithm=text, calibration=batches, target="reference")
        emit(name, "algorithms", {text: judged(model, bench)})


TASKS = {"base": base, "longer": longer, "training": training, "algorithms": algorithms}


def _seeds(
    bench: Bench,
    model: nn.Module,
    rates: Sequence[float],
    emit: Callable[[Row], None],
    done: Callable[[Row], None] | None = None,
) -> None:
    """The first seed at every rate, the others at the best; no run is begun that would end too late. What is
    known is told after each."""
    given, began = bench.given, time.perf_counter()
    prepared = any(getattr(module, "is_prepared", False) for module in model.modules())
    # What is not rounded says what its teacher says already: it learns from the text, or from both.
    tasks = given.tasks if prepared else [task for task in given.tasks if task] or [1.0]
    steps = Steps(model, bench.model if min(tasks) < 1 else None, bench)
    found: Row = {"compiled": steps.compiled, "captured": steps.captured}
    found["ready_seconds"] = round(time.perf_counter() - began, 1)
    tried, others, longest = list[Row](), list[Row](), 0.0
    plan = [(0, rate, task) for rate in rates for task in tasks]
    plan += [(seed, 0.0, 0.0) for seed in range(1, given.seeds)]
    for seed, rate, task in plan:
        if longest and time.time() + longest > given.until:
            print(f"no time left for seed {seed}", flush=True)
            break
        start, first = time.perf_counter(), min(tried, key=_validation, default=None)
        if seed and first is not None:
            rate, task = first["rate"], first["task"]
        row = trained(steps, bench, seed, rate, given.steps, task)
        made = row.pop("model")
        longest = max(longest, time.perf_counter() - start)
        (others if seed else tried).append(row)
        best = min(tried, key=_validation)
        if done is not None and (best is row or seed):
            done(row | {"model": made})
        runs = [best, *others]
        found |= {"runs": runs, "tried": [{k: v for k, v in one.items() if k != "curve"} for one in tried]}
        found["converted_equal"] = all(one["equal"] for one in (*tried, *others))
        emit(found)


def _names(given: argparse.Namespace) -> list[str]:
    return given.formats.split(";") if given.formats else list(FORMATS)


def _validation(row: Row) -> float:
    return float(row["judged"]["validation"])


def on_a_card(number: Any) -> None:
    """The processes of the pool take the cards in turns."""
    with number.get_lock():
        mine, number.value = number.value, number.value + 1
    if torch.cuda.is_available():
        torch.cuda.set_device(mine % torch.cuda.device_count())


def work(given: argparse.Namespace, kind: str, name: str, told: Any) -> None:
    """One task, in a process of its own; what it finds goes into the queue."""
    TASKS[kind](Bench(given), name, lambda *said: told.put((kind, *said)))


def measure(given: argparse.Namespace, path: Path) -> Row:
    """All tasks; the file is written after each run, so that an interrupted one has what it had."""
    names = _names(given)
    tasks = [("longer", ""), *(("training", name) for name in names)]
    tasks += [("algorithms", name) for name in names] if given.algorithms else []
    tasks = [task for task in tasks if task[0] in given.parts.split(",")]
    options = {name: str(value) for name, value in vars(given).items()}
    found: Row = {"torch": torch.__version__, "card": device_word(), "options": options}
    found |= {FLOAT: {}, "formats": {name: {} for name in names}, "failed": {}}

    def done(kind: str, name: str, part: str, row: Row) -> None:
        into = found[FLOAT] if name == FLOAT else found["formats"][name]
        (into.setdefault(part, {}) if part else into).update(row)
        found["summary"] = summary(found)
        write(path, found)
        told = {key: value for key, value in row.items() if key not in ("runs", "tried")}
        for run in (row.get("tried", [])[-1:], row.get("runs", [])[-1:]):
            told |= {f"seed {one['seed']}, rate {one['rate']}, {one['task']}": one["judged"] for one in run}
        print(kind, name, told, flush=True)

    given.base.unlink(missing_ok=True)
    if given.processes == 1:
        for kind, name in [("base", ""), *tasks]:
            TASKS[kind](Bench(given), name, lambda *said, kind=kind: done(kind, *said))
        return found
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    fresh = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        given.processes, mp_context=fresh, initializer=on_a_card, initargs=(fresh.Value("i", 0),)
    )
    with fresh.Manager() as manager, pool:
        told = manager.Queue()
        for some in ([("base", "")], tasks):
            waiting = {pool.submit(work, given, *one, told): one for one in some}
            while waiting or not told.empty():
                try:
                    done(*told.get(timeout=0.5))
                except Empty:
                    _finished(waiting, found, path)
    return found


def _finished(waiting: dict[Future[None], tuple[str, str]], found: Row, path: Path) -> None:
    """Let go of tasks that are done, and note those that failed."""
    for future in [one for one in waiting if one.done()]:
        kind, name = waiting.pop(future)
        error = future.exception()
        if error is not None:
            found["failed"][f"{kind} {name}".strip()] = f"{type(error).__name__}: {error}"
            write(path, found)
            print(kind, name, "failed:", error, flush=True)


def main() -> None:
    given = _arguments()
    if given.draw is not None:
        _draw(json.loads(given.draw.read_text(encoding="utf-8")), given.draw.with_suffix(".png"))
        return
    if given.join is not None:
        found = joined(*(json.loads(path.read_text(encoding="utf-8")) for path in given.join))
        write(given.join[0], found)
        _draw(found, given.join[0].with_suffix(".png"))
        print(table(found["summary"]))
        return
    given.until = time.time() + given.seconds
    given.out.mkdir(parents=True, exist_ok=True)
    given.base = given.out / "qat-lm-base.safetensors"
    path = given.out / f"qat-lm-{device_word()}.json"
    found = measure(given, path)
    if not curves(found) and "training" in given.parts:
        raise SystemExit(f"nothing was trained: {found['failed']}")
    print(table(found.get("summary", {})))
    try:
        _draw(found, path.with_suffix(".png"))
    except ModuleNotFoundError as error:
        print(f"{error}; draw later: python benchmarks/qat_lm.py --draw {path}")


def _draw(found: Row, path: Path) -> None:
    draw(curves(found), path, "step", "loss in training (nats a token)", every=20)


def _numbers(text: str) -> list[float]:
    return [float(one) for one in text.split(",")]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("out/lm"))
    parser.add_argument("--model", default="", help="a folder (default: the one in the repository)")
    parser.add_argument("--tiny", action="store_true", help="random weights and tokens")
    parser.add_argument("--base-steps", type=int, default=3000, help="in floats, before all else")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rates", type=_numbers, help="instead of each format's, for what trains rounded")
    parser.add_argument("--scale-rate", type=float, default=0.1, help="of learned scales, times the rate")
    parser.add_argument("--tasks", type=_numbers, default=[0.0], help="shares of the text's own loss to try")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=0, help="of each text to judge by; 0: all")
    parser.add_argument("--calibration", type=int, default=128, help="windows for the algorithms")
    parser.add_argument("--gradient", default="lsq")
    parser.add_argument("--activation", default="clip")
    parser.add_argument("--start", default="clip", help="of learned scales: rule or clip")
    parser.add_argument("--parts", default="longer,training,algorithms", help="some of these")
    parser.add_argument("--no-algorithms", dest="algorithms", action="store_false")
    parser.add_argument("--formats", default="", help="some of the formats, with ; between them")
    parser.add_argument("--processes", type=int, default=1, help="at a time, on all cards")
    parser.add_argument("--seconds", type=float, default=1e6, help="no run is begun that would end later")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--capture", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--save", action="store_true", help="write the int4[g32] model, for qat_targets.py")
    parser.add_argument("--draw", type=Path, help="only the curves of this JSON")
    parser.add_argument(
        "--join", type=Path, nargs=2, help="write the floats of the second JSON into the first"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
