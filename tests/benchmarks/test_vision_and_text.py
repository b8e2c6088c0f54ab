"""The networks and measures of `benchmarks/vision_and_text.py`, without the published weights."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from vision_and_text import Row, _write, agreement, digits, recipes, sentences
from vision_models import EfficientNetLite0


def test_lite0_has_the_published_number_of_parameters_and_pads_as_tensorflow_does() -> None:
    model = EfficientNetLite0().eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_652_008
    sizes = []
    for module in (model._conv_stem, model._blocks[1], model._blocks[3], model._conv_head):
        module.register_forward_hook(lambda _, __, out: sizes.append(out.shape[-1]))
    with torch.no_grad():
        assert model(torch.randn(1, 3, 224, 224)).shape == (1, 1000)
    assert sizes == [112, 56, 28, 7]


def test_sentences_are_enough_and_in_an_order_of_their_own() -> None:
    """Not in that of a set, which is another in each process."""
    found = sentences()
    assert len(found) > 200 and found == sorted(set(found))
    assert all(30 < len(one) < 300 and "\n" not in one for one in found)


def test_agreement_where_the_first_model_is_sure() -> None:
    wanted = torch.tensor([[2.0, 0.0, 0.0], [0.01, 0.0, -9.0], [0.0, 3.0, 0.0]])
    got = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.01, -9.0], [0.0, 1.0, 0.0]])
    found = agreement(wanted, got)
    assert found["same class"] == pytest.approx(200 / 3) and found["where sure"] == 100.0
    assert found["largest margin of a change"] == pytest.approx(100 * 0.01 / 2, rel=0.01)  # of two equals
    assert agreement(wanted, wanted)["largest margin of a change"] == 0.0
    assert agreement(wanted, got.flip(0))["where sure"] == 0.0


def test_digits_lose_little() -> None:
    pytest.importorskip("sklearn", reason="the digits: pip install scikit-learn")
    given = Namespace(observers=["minmax"], seconds=0, batches=[], epochs=4)
    rows = list(digits(given))
    static = [recipe.name for recipe in recipes(["minmax"])]
    named = [f"{name}{biases}" for name in static for biases in ("", ", biases corrected")]
    weights = [f"int8_conv{wide}{biases}" for wide in ("", ", wide") for biases in ("", ", biases corrected")]
    assert [row.way for row in rows] == ["float32", *named, *weights]
    assert rows[0].loss["accuracy"] > 80
    for row in rows[1:]:
        assert row.bytes < rows[0].bytes / 3
        assert row.loss["dB"] > 25 and abs(row.loss["accuracy"] - rows[0].loss["accuracy"]) < 2


def test_what_was_asked_stays_with_the_rows_it_gave(tmp_path: Path) -> None:
    """Rows of a model that is not run again are of its own run, and so is what is said of them."""
    out = tmp_path / "loss.json"
    for name, crops in (("lite0", 32), ("digits", 64)):
        _write(
            Namespace(out=out, models=[name], crops=crops, observers=[name]), name, [Row(name, "way", {}, 1)]
        )
    found = json.loads(out.read_text())
    assert {name: about["asked"] for name, about in found["about"].items()} == {
        "digits": {"crops": 64, "observers": ["digits"]},
        "lite0": {"crops": 32, "observers": ["lite0"]},
    }
    assert [row["model"] for row in found["rows"]] == ["digits", "lite0"]
