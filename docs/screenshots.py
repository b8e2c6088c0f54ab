"""The pictures in notes/viz.md: SmolLM2 as the page shows it, taken in headless Chromium.

In: a Chromium, SmolLM2. Out: notes/images/viz-*.png.

    python docs/screenshots.py
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bitfold.lowering import Pipeline
from bitfold.tools.inspection import Inspection, inspect
from bitfold.tools.page import Logits
from bitfold.tools.smollm2 import load_smollm2
from bitfold.tools.viz import viz

HERE = Path(__file__).parent
IMAGES = HERE / "notes" / "images"
LAYER = "model.model.layers.12"
# name -> (page, address, what is done before the picture is taken)
SHOTS = {
    "viz-errors": ("one", f"theme=light&overlay=isolated&module={LAYER}", f"Main.toggle('{LAYER}')"),
    "viz-kernel": (
        "one",
        "theme=dark&step=4&node=fused_model_model_layers_12_self_attn_v_proj",
        "document.querySelector('.kernel').scrollIntoView()",
    ),
    "viz-two": ("two", "theme=light&overlay=isolated&tab=compare", "0"),
}


def browser(profile: Path) -> Any:
    """The one that the tests of the page use."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        sys.exit("this needs Chromium: apt-get install chromium")
    file = HERE.parent / "tests" / "tools" / "conftest.py"
    spec = importlib.util.spec_from_file_location("conftest", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Browser(program, profile)


def look(model: Any, recipe: str, inputs: tuple[Any, ...]) -> Inspection:
    """Not timed: a picture is no measurement."""
    steps = Pipeline.parse(f'annotate{{recipe="{recipe}"}},fold,fuse,lower{{target=cpu}}')
    return inspect(Logits(model), steps, inputs, dynamic="batch+sequence", runs=0)


def main() -> None:
    import torch

    model = load_smollm2().model
    inputs = (torch.randint(0, 1000, (1, 10), generator=torch.Generator().manual_seed(0)),)
    four, eight = look(model, "int4[g64]", inputs), look(model, "int8_all", inputs)
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        titles = {"title": "SmolLM2, int4[g64]", "other_title": "SmolLM2, int8_all"}
        pages = {
            "one": viz(four, place / "one.html", title=titles["title"]),
            "two": viz(four, place / "two.html", other=eight, **titles),
        }
        started = browser(place / "profile")
        try:
            for name, (page, address, before) in SHOTS.items():
                tab = started.open(pages[page], hash=address)
                tab.evaluate(before)
                time.sleep(0.6)  # the picture is painted anew once a zoom has come to rest
                print(tab.screenshot(IMAGES / f"{name}.png"))
        finally:
            started.close()


if __name__ == "__main__":
    main()
