"""The demo from end to end on a model of two layers: the table, the texts, the JSON and the page."""

from __future__ import annotations

import json
from contextlib import nullcontext
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bitfold import BitfoldError, format
from bitfold.tools import demo as demo_module
from bitfold.tools.demo import RECIPES, demo, table
from bitfold.tools.page import write_page
from bitfold.tools.smollm2 import SmolLM2
from bitfold.tools.trial import Speed, Trial

transformers = pytest.importorskip("transformers")


class Letters:
    """A tokenizer with a token for each character."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 128 for letter in text]}

    def apply_chat_template(self, chat: list[dict[str, str]], **options: Any) -> str:
        return chat[0]["content"]

    def decode(self, ids: torch.Tensor, **options: Any) -> str:
        return "said: [g64] " + " ".join(map(str, ids.tolist()))


def tiny() -> SmolLM2:
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    name = "model.layers.0.mlp.up_proj.weight"
    stored = {name: format("q4_1").quantize(model.get_parameter(name).detach())}
    return SmolLM2(model, Letters(), stored)


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_module, "load_smollm2", tiny)
    monkeypatch.setattr(demo_module, "fresh_compiler_cache", nullcontext)
    out = StringIO()
    console = Console(file=out, width=100, force_terminal=False)
    recipes = ("int4[g64]", "stored")
    trials = demo(recipes=recipes, out=tmp_path / "out", device="cpu", batches=(1,), steps=5, console=console)
    text = out.getvalue()
    assert [trial.recipe for trial in trials] == list(recipes)
    rows = [line.split()[0] for line in text.splitlines() if "MiB" in line]
    assert rows == list(recipes)
    assert text.count("said: [g64]") == 2
    assert text.count("the checkpoint has no codes for this weight") == 4  # what was not given is said
    assert "stored: and 11 more" in text
    record = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert [trial["recipe"] for trial in record["trials"]] == list(recipes)
    assert record["where"]["torch"] == torch.__version__
    page = (tmp_path / "out" / "demo.html").read_text()
    assert "annotate" in page and "up_proj" in page and 'extern \\"C\\" void run(' in page
    data = json.loads(page.split('<script id="data" type="application/json">')[1].split("</script>")[0])
    kernels, work = data["overlays"]["kernels"], data["overlays"]["work"]
    assert kernels and all(work[name][2] > 0 for name in kernels), "kernels, with their times"


def test_an_unknown_recipe_stops_it_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_module, "load_smollm2", lambda: pytest.fail("was read"))
    with pytest.raises(BitfoldError, match="did you mean"):
        demo(recipes=("none", "int88"), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_table_fits_a_terminal() -> None:
    """80 columns, with the demo's own recipes and numbers of its size: nothing is cut or wrapped."""
    speeds = {1: Speed(123.45, 10.0), 8: Speed(1234.5, 11.0)}
    trials = [Trial(recipe, "", 538060032, 15.77513, 12.3, speeds, "", ()) for recipe in RECIPES]
    out = StringIO()
    Console(file=out, width=80).print(table(trials, (1, 8)))
    lines = out.getvalue().splitlines()
    assert len(lines) == 2 + len(RECIPES)  # the head has two lines
    assert lines[-1].split() == (
        ["int4[g64]", "513.1", "MiB", "15.7751", "+0.00%", "123.5", "1234.5", "12.3", "s", "21", "s"]
    )


def test_the_page_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    loaded = tiny()
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    path = write_page(loaded.model, "int8_all", torch.randint(0, 128, (2, 8)), tmp_path / "page.html")
    assert path.stat().st_size > 10_000
    after = loaded.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
