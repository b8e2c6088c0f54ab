"""Checkpoints that lie, are incomplete or cannot be written: said in one sentence, and nothing is changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import bitfold as bf
from bitfold.lowering.checkpoints import folder as folder_module

Config = dict[str, Any]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 96)
        self.norm = nn.LayerNorm(96)
        self.down = nn.Linear(96, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x)))  # type: ignore[no-any-return]


def _saved(folder: Path, recipe: str = "int4[g32]") -> nn.Module:
    torch.manual_seed(0)
    model = bf.quantize(Model(), recipe, target="reference")
    bf.save_checkpoint(model, folder)
    return model  # type: ignore[no-any-return]


def _skeleton() -> Model:
    with torch.device("meta"):
        return Model()


def _refused(folder: Path, match: str) -> None:
    skeleton = _skeleton()
    before = {name: id(value) for name, value in skeleton.state_dict(keep_vars=True).items()}
    with pytest.raises(bf.BitfoldError, match=match):
        bf.load_checkpoint(folder, into=skeleton, target="reference")
    assert {name: id(value) for name, value in skeleton.state_dict(keep_vars=True).items()} == before


def _edit_config(folder: Path, change: Callable[[Config], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def _edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def _group(config: Config) -> Config:
    found: Config = config["config_groups"]["group_0"]
    return found


CONFIGS: dict[str, tuple[Callable[[Config], object], str]] = {
    "a pattern that does not compile": (lambda c: c.update(ignore=["re:(["]), "no pattern"),
    "a target's pattern": (lambda c: _group(c).update(targets=["re:*"]), "no pattern"),
    "a number to ignore": (lambda c: c.update(ignore=[3]), "is a int where a str"),
    "text to ignore": (lambda c: c.update(ignore="up"), "is a str where a list"),
    "targets are a number": (lambda c: _group(c).update(targets=5), "is a int where a list"),
    "groups are a list": (lambda c: c.update(config_groups=[1]), "where a mapping"),
    "weights are a list": (lambda c: _group(c).update(weights=[1]), "where a mapping"),
    "inputs are text": (lambda c: _group(c).update(input_activations="x"), "where a mapping"),
    "sparsity is text": (lambda c: c.update(sparsity_config="x"), "where a mapping"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_that_is_damaged(case: str, tmp_path: Path) -> None:
    change, match = CONFIGS[case]
    _saved(tmp_path)
    _edit_config(tmp_path, change)
    _refused(tmp_path, match)


TENSORS: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "a row of scales too short": (
        "int8",
        lambda t: t.update({"up.weight_scale": torch.ones(5)}),
        r"weight_scale is \[5\]",
    ),
    "a scale that is no number": (
        "int4[g32]",
        lambda t: t["up.weight_scale"].fill_(float("nan")),
        "NaN or infinity",
    ),
    "a divisor of zero": (
        "nvfp4",
        lambda t: t.update({"up.weight_global_scale": torch.zeros(1)}),
        "NaN or infinity",
    ),
    "an exponent that is no number": ("mxfp4", lambda t: t["up.weight_scale"].fill_(255), "NaN or infinity"),
    "a bias of integers": (
        "int4[g32]",
        lambda t: t.update({"up.bias": torch.ones(96, dtype=torch.int64)}),
        "numbers of one kind",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_damaged(case: str, tmp_path: Path) -> None:
    recipe, change, match = TENSORS[case]
    _saved(tmp_path, recipe)
    _edit_tensors(tmp_path, change)
    _refused(tmp_path, match)


def test_a_model_on_meta_computes_in_the_dtype_of_what_is_not_quantized(tmp_path: Path) -> None:
    """Its scales are bfloat16, and no configuration says that the model is float32."""
    model = _saved(tmp_path)
    loaded = bf.load_checkpoint(tmp_path, into=_skeleton(), target="reference")
    x = torch.randn(3, 64)
    assert torch.equal(loaded(x), model(x))


def _in_two_files(folder: Path, change: Callable[[dict[str, str]], object] = lambda _: None) -> None:
    """The tensors of `up` in the first file; in the second all others and a wrong bias of `up`."""
    tensors = load_file(folder / "model.safetensors")
    first = {name: tensor for name, tensor in tensors.items() if name.startswith("up.")}
    second = {name: tensor for name, tensor in tensors.items() if name not in first}
    save_file(first, folder / "model-1.safetensors")
    save_file(second | {"up.bias": torch.full((96,), 7.0)}, folder / "model-2.safetensors")
    (folder / "model.safetensors").unlink()
    names = dict.fromkeys(first, "model-1.safetensors") | dict.fromkeys(second, "model-2.safetensors")
    change(names)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def test_a_tensor_in_two_files_is_that_of_the_index(tmp_path: Path) -> None:
    model = _saved(tmp_path)
    _in_two_files(tmp_path)
    loaded = bf.load_checkpoint(tmp_path, into=_skeleton(), target="reference")
    x = torch.randn(3, 64)
    assert torch.equal(loaded(x), model(x))


def test_a_tensor_in_two_files_and_no_index(tmp_path: Path) -> None:
    _saved(tmp_path)
    _in_two_files(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    _refused(tmp_path, r"'up\.bias' in model-1\.safetensors and in model-2")


INDEXES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a file that lacks it": (lambda names: names.update({"up.bias2": "model-1.safetensors"}), "lacks"),
    "a number": (lambda names: names.update({"up.bias": 3}), "no weight_map"),
    "a file elsewhere": (lambda names: names.update({"up.bias": "../x.safetensors"}), "not a file of this"),
    "the folder above": (lambda names: names.update({"up.bias": ".."}), "not a file of this"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_that_lies(case: str, tmp_path: Path) -> None:
    change, match = INDEXES[case]
    _saved(tmp_path)
    _in_two_files(tmp_path, change)
    _refused(tmp_path, match)


def test_an_index_that_is_a_list(tmp_path: Path) -> None:
    _saved(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": ["model.safetensors"]}')
    _refused(tmp_path, "no weight_map")


class Tied(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 64)
        self.head = nn.Linear(64, 96, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("recipe", ["int8_all", "int8"])
def test_two_weights_are_not_put_into_one(recipe: str, tmp_path: Path) -> None:
    rules = bf.Recipe("r", (bf.Rule(op="linear|head", weight="int8"),))
    model = bf.quantize(Tied(tied=False), recipe if recipe == "int8_all" else rules, target="reference")
    bf.save_checkpoint(model, tmp_path)
    with pytest.raises(bf.BitfoldError, match="without that tie"):
        bf.load_checkpoint(tmp_path, into=Tied(), target="reference")
    loaded = bf.load_checkpoint(tmp_path, into=Tied(tied=False), target="reference")
    x = torch.arange(96)
    assert torch.equal(loaded(x), model(x))


def test_a_tied_weight_under_both_names_is_one(tmp_path: Path) -> None:
    model = bf.quantize(Tied(), "int8_all", target="reference")
    bf.save_checkpoint(model, tmp_path)
    loaded = bf.load_checkpoint(tmp_path, into=Tied(), target="reference")
    x = torch.arange(96)
    assert torch.equal(loaded(x), model(x))


def test_what_was_saved_stays_if_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are not put in place while the configuration that says what they are is not on the disk."""
    model = _saved(tmp_path)

    def full(path: Path, *args: object, **kwargs: object) -> int:
        raise OSError(28, "No space left on device")

    other = bf.quantize(Model(), "int8", target="reference")
    monkeypatch.setattr(folder_module.Path, "write_text", full)
    with pytest.raises(bf.BitfoldError, match="No space left"):
        bf.save_checkpoint(other, tmp_path)
    monkeypatch.undo()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = bf.load_checkpoint(tmp_path, into=_skeleton(), target="reference")
    x = torch.randn(3, 64)
    assert torch.equal(loaded(x), model(x))


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 32, bias=False)


def _by_column(folder: Path, method: str, change: Callable[[dict[str, Tensor]], object]) -> None:
    """A layer as GPTQ or AWQ packs it, its zero points in the middle, and one thing wrong with it."""
    tensors = {
        "up.qweight": torch.zeros((8, 32) if method == "gptq" else (64, 4), dtype=torch.int32),
        "up.qzeros": torch.full((2, 4), 0x77777777, dtype=torch.int32),
        "up.scales": torch.ones(2, 32, dtype=torch.float16),
        "up.g_idx": (torch.arange(64) // 32).int(),
    }
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    config = {"quant_method": method, "bits": 4, "group_size": 32}
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))


COLUMNS: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "one scale": ("gptq", lambda t: t.update({"up.scales": torch.tensor(1.0).half()}), "each a matrix"),
    "one word": ("awq", lambda t: t.update({"up.qweight": torch.tensor(1).int()}), "each a matrix"),
    "zero points as floats": ("awq", lambda t: t.update({"up.qzeros": t["up.qzeros"].float()}), "qzeros are"),
    "zero points as halves": ("gptq", lambda t: t.update({"up.qzeros": torch.ones(2, 4)}), "qzeros are"),
    "no zero points": ("awq", lambda t: t.pop("up.qzeros"), "no qzeros"),
    "an order of floats": ("gptq", lambda t: t.update({"up.g_idx": torch.arange(64) / 32}), "g_idx is"),
    "an order in rows": ("gptq", lambda t: t.update({"up.g_idx": t["up.g_idx"].reshape(8, 8)}), "g_idx is"),
    "a far group": ("gptq", lambda t: t["up.g_idx"].fill_(2**31 - 1), "does not name each of 2 groups"),
    "an infinite scale": ("gptq", lambda t: t["up.scales"].fill_(torch.inf), "NaN or infinity"),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_words_by_column_that_are_damaged(case: str, tmp_path: Path) -> None:
    method, change, match = COLUMNS[case]
    _by_column(tmp_path, method, change)
    with pytest.raises(bf.BitfoldError, match=match):
        bf.load_checkpoint(tmp_path, into=One(), target="reference")


def test_a_configuration_nested_without_end(tmp_path: Path) -> None:
    _saved(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    _refused(tmp_path, "cannot be read as JSON")
