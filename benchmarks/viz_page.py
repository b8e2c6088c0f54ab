"""How fast the page is: SmolLM2 inspected, and 5,000 nodes, opened and moved in headless Chromium.

In: a Chromium. Out: a table, and `results/viz_page.json`.

    python benchmarks/viz_page.py --recipe 'int4[g64]'

`open`: milliseconds from navigation to a page that answers; `all`: to open every module; `pan`: milliseconds
a frame while it moves, as it opens, with everything open, and with everything in sight. The fastest of five.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from bitfold.lowering import Pipeline
from bitfold.tools.inspection import inspect
from bitfold.tools.page import Logits
from bitfold.tools.roof import processor
from bitfold.tools.smollm2 import load_smollm2
from bitfold.tools.viz import viz

HERE = Path(__file__).parent
TESTS = HERE.parent / "tests" / "tools"
RESULTS = HERE / "results" / "viz_page.json"


def module(name: str) -> Any:
    """A file of the tests: the browser, and what is measured in it, are theirs."""
    spec = importlib.util.spec_from_file_location(name, TESTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def measured(browser: Any, page: Path, tests: Any) -> dict[str, float]:
    """Milliseconds."""
    opened, frames = [], []
    for _ in range(5):
        tab = browser.open(page)
        opened.append(tab.evaluate("performance.now()"))
        frames.append(tab.frame_ms())
    all_open = tab.evaluate(tests.OPEN_ALL_MS)
    inside = [tab.frame_ms() for _ in range(5)]
    tab.evaluate("Main.fit()")
    in_sight = [tab.frame_ms() for _ in range(5)]
    found = {"open": min(opened), "all": all_open, "pan": min(frames), "pan_all_open": min(inside)}
    return {key: round(value, 1) for key, value in (found | {"pan_in_sight": min(in_sight)}).items()}


def smollm2(recipe: str, path: Path) -> Path:
    """The page of SmolLM2 with everything in it."""
    import torch

    loaded = load_smollm2()
    steps = Pipeline.parse(f'annotate{{recipe="{recipe}"}},fold,fuse,lower{{target=cpu}}')
    tokens = torch.randint(0, 1000, (1, 10), generator=torch.Generator().manual_seed(0))
    return viz(inspect(Logits(loaded.model), steps, (tokens,), dynamic="batch+sequence", runs=1), path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="int4[g64]")
    parser.add_argument("--page", type=Path, help="a page to measure in SmolLM2's place")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        sys.exit("this needs Chromium: apt-get install chromium")
    tests = module("test_viz_page")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        pages = {
            "5,000 nodes": tests.steps_page(place / "large.html", tests.layered(100, 50)),
            "SmolLM2": given.page or smollm2(given.recipe, place / "smollm2.html"),
        }
        browser = module("conftest").Browser(program, place / "profile")
        try:
            rows = [{"page": name, **measured(browser, page, tests)} for name, page in pages.items()]
        finally:
            browser.close()
    for row in rows:
        print(row, flush=True)
    given.out.write_text(
        json.dumps({"processor": processor(), "rows": rows}, indent=2) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
