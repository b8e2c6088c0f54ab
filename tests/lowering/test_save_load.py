"""`bf.save` and `bf.load`: models into skeletons, programs alone, other targets, every kind of bad file."""

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import bitfold as bf


class Model(nn.Module):
    """Tied head, a buffer that is saved by nobody else, a convolution, a parameter of its own."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, hidden)
        self.mix = nn.Conv1d(hidden, hidden, 3, padding=1)
        self.up = nn.Linear(hidden, 128)
        self.down = nn.Linear(128, hidden, bias=False)
        self.norm = nn.LayerNorm(hidden)
        self.lm_head = nn.Linear(hidden, 50, bias=False)
        self.lm_head.weight = self.embed.weight
        self.gain = nn.Parameter(torch.ones(hidden))
        self.register_buffer("shift", torch.arange(hidden) / hidden, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) * self.gain + self.shift
        x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        return self.lm_head(self.norm(x + self.down(torch.relu(self.up(x)))))


EVERYTHING = bf.Recipe(
    "everything",
    tuple(
        bf.Rule(op=op, weight=text)
        for op, text in {"linear": "int4[g32]", "conv": "int8", "embedding": "int8", "head": "int8"}.items()
    ),
)
TOKENS = torch.arange(10).reshape(2, 5)


def skeleton(hidden: int = 64) -> Model:
    with torch.device("meta"):
        return Model(hidden).eval()


def saved(path: Path, recipe: Any = EVERYTHING, target: str = "reference") -> Model:
    model = bf.quantize(Model().eval(), recipe, target=target)
    bf.save(model, path)
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "recipe", ["int8", "int4[g32]", "uint3[g64,zero]", "nvfp4", "mxfp6", "nf4[g64]", "int8[g64,2:4]"]
)
def test_into_a_meta_skeleton(tmp_path: Path, recipe: str) -> None:
    model = saved(tmp_path / "m.safetensors", recipe)
    loaded = bf.load(tmp_path / "m.safetensors", into=skeleton(), target="reference")
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert not any(p.is_meta for p in (*loaded.parameters(), *loaded.buffers()))
    assert [(n, p.dtype, p.shape) for n, p in loaded.named_parameters()] == [
        (n, p.dtype, p.shape) for n, p in model.named_parameters()
    ]


@pytest.mark.parametrize(("saver", "loader"), [("cpu", "reference"), ("reference", "cpu"), ("cpu", "cpu")])
def test_saved_on_one_target_runs_on_another(tmp_path: Path, saver: str, loader: str) -> None:
    model = saved(tmp_path / "m.safetensors", target=saver)
    loaded = bf.load(tmp_path / "m.safetensors", into=skeleton(), target=loader)
    assert loaded.lm_head.codes is loaded.embed.codes
    for name in ("up", "down", "mix", "embed"):
        assert torch.equal(getattr(loaded, name).weight, getattr(model, name).weight)
    # Both run eagerly, on decoded weights that are equal: the same sums in another order at most.
    torch.testing.assert_close(loaded(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)


def test_the_file_does_not_depend_on_the_target(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved(tmp_path / "a.safetensors", target="cpu")
    torch.manual_seed(0)
    saved(tmp_path / "b.safetensors", target="reference")
    again = bf.load(tmp_path / "b.safetensors", into=skeleton(), target="cpu")
    bf.save(again, tmp_path / "c.safetensors")
    first = (tmp_path / "a.safetensors").read_bytes()
    assert first == (tmp_path / "b.safetensors").read_bytes()
    assert first == (tmp_path / "c.safetensors").read_bytes()


def test_safetensors_reads_the_file(tmp_path: Path) -> None:
    model = saved(tmp_path / "m.safetensors")
    tensors = load_file(tmp_path / "m.safetensors")
    assert torch.equal(tensors["up.codes"], model.up.codes) and torch.equal(tensors["shift"], model.shift)
    assert "lm_head.codes" not in tensors and "up.weight" not in tensors


def test_into_a_model_with_weights_and_into_a_quantized_one(tmp_path: Path) -> None:
    model = saved(tmp_path / "m.safetensors")
    for other in (Model().eval(), bf.quantize(Model().eval(), "int8", target="cpu")):
        loaded = bf.load(tmp_path / "m.safetensors", into=other, target="reference")
        assert loaded is other and torch.equal(loaded(TOKENS), model(TOKENS))
    assert loaded.gain.requires_grad and not loaded.up.codes.requires_grad


def test_codes_are_mapped_from_the_file(tmp_path: Path) -> None:
    saved(tmp_path / "m.safetensors")
    loaded = bf.load(tmp_path / "m.safetensors", into=skeleton(), target="reference")
    before = loaded(TOKENS)
    bf.save(loaded, tmp_path / "m.safetensors")  # over the file that it is mapped from
    assert torch.equal(loaded(TOKENS), before)
    assert torch.equal(
        bf.load(tmp_path / "m.safetensors", into=skeleton(), target="reference")(TOKENS), before
    )


def test_a_static_recipe_keeps_its_ranges(tmp_path: Path) -> None:
    model = bf.quantize(Model().eval(), "int8_static", calibration=[TOKENS, TOKENS + 7], target="reference")
    bf.save(model, tmp_path / "m.safetensors")
    loaded = bf.load(tmp_path / "m.safetensors", into=skeleton(), target="reference")
    assert torch.equal(loaded(TOKENS + 20), model(TOKENS + 20))


def test_a_module_of_an_unknown_kind(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=40, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    bf.quantize(model, "int8", example_inputs={"input_ids": TOKENS}, target="reference")
    assert not bf.report(model).misses
    bf.save(model, tmp_path / "m.safetensors")
    with torch.device("meta"):
        empty = transformers.GPT2LMHeadModel(config).eval()
    loaded = bf.load(tmp_path / "m.safetensors", into=empty, target="reference")
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert loaded.transformer.h[0].attn.c_attn.weight.shape == (32, 96)


def test_a_bf16_model(tmp_path: Path) -> None:
    model = bf.quantize(Model().eval(), EVERYTHING, target="reference").to(torch.bfloat16)
    bf.save(model, tmp_path / "m.safetensors")
    loaded = bf.load(tmp_path / "m.safetensors", into=skeleton(), target="reference")
    assert loaded(TOKENS).dtype == torch.bfloat16 and torch.equal(loaded(TOKENS), model(TOKENS))


# Programs


@pytest.mark.parametrize(
    ("saver", "loader"), [("reference", "reference"), ("cpu", "reference"), ("reference", "cpu")]
)
def test_a_program_alone(tmp_path: Path, saver: str, loader: str) -> None:
    model = Model().eval()
    program = bf.quantize(
        copy.deepcopy(model),
        EVERYTHING,
        scope="program",
        example_inputs=(TOKENS,),
        dynamic="batch+sequence",
        target=saver,
    )
    bf.save(program, tmp_path / "p.safetensors")
    loaded = bf.load(tmp_path / "p.safetensors", target=loader)
    expected = bf.quantize(model, EVERYTHING, target="reference")
    for tokens in (TOKENS, torch.arange(21).reshape(7, 3)):
        out = loaded(tokens)
        if saver == loader == "reference":
            assert torch.equal(out, expected(tokens))
        torch.testing.assert_close(out, expected(tokens), rtol=1e-4, atol=1e-4)
    bf.save(loaded, tmp_path / "q.safetensors")
    assert (tmp_path / "p.safetensors").read_bytes() == (tmp_path / "q.safetensors").read_bytes()


def test_a_graph_that_a_pipeline_folded(tmp_path: Path) -> None:
    gm = bf.capture(Model().eval(), (TOKENS,))
    bf.Pipeline.parse("annotate{recipe=int8},fold").run(gm)
    bf.save(gm, tmp_path / "p.safetensors")
    assert torch.equal(bf.load(tmp_path / "p.safetensors", target="reference")(TOKENS), gm(TOKENS))


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Any]:
        with torch.no_grad():
            y = self.fc(x)
        return {"y": y * scale, "z": (y.reshape(-1, x.shape[0]), [y.sum()])}


def test_names_and_nesting_of_a_program_are_kept(tmp_path: Path) -> None:
    x, scale = torch.randn(3, 8), torch.tensor(2.0)
    program = bf.quantize(
        Structured(), "int8", scope="program", example_inputs={"x": x, "scale": scale}, target="reference"
    )
    bf.save(program, tmp_path / "p.safetensors")
    loaded = bf.load(tmp_path / "p.safetensors", target="reference")
    ours, theirs = loaded(x=x, scale=scale), program(x=x, scale=scale)
    assert torch.equal(ours["y"], theirs["y"]) and torch.equal(ours["z"][1][0], theirs["z"][1][0])


def test_a_transformers_program(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=50,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    inputs = {"input_ids": TOKENS, "use_cache": False}
    program = bf.quantize(model, "int8", scope="program", example_inputs=inputs, target="reference")
    bf.save(program, tmp_path / "p.safetensors")
    loaded = bf.load(tmp_path / "p.safetensors", target="reference")
    assert torch.equal(loaded(**inputs).logits, program(**inputs).logits)


# What is wrong with a file is said in one sentence, and the skeleton stays as it was.


def header_edit(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the safetensors header of the file by `edit`, which gets it with bitfold's own part parsed."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"]["bitfold"] = json.loads(header["__metadata__"]["bitfold"])
    edit(header)
    header["__metadata__"]["bitfold"] = json.dumps(header["__metadata__"]["bitfold"])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def rename(header: dict[str, Any]) -> None:
    header["up.codez"] = header.pop("up.codes")


def reshape(header: dict[str, Any]) -> None:
    header["up.codes"]["shape"] = header["up.codes"]["shape"][::-1]


def reshape_both(header: dict[str, Any]) -> None:
    reshape(header)
    header["__metadata__"]["bitfold"]["tensors"]["up.codes"][1].reverse()


def newer(header: dict[str, Any]) -> None:
    header["__metadata__"]["bitfold"] |= {"version": 99, "bitfold": "7.1"}


def foreign(header: dict[str, Any]) -> None:
    header["__metadata__"]["bitfold"]["graphs"][0]["nodes"][-2]["target"] = "os.system"


def injected(header: dict[str, Any]) -> None:
    header["__metadata__"]["bitfold"]["graphs"][0]["nodes"][0]["target"] = "x): import os #"


def damaged(header: dict[str, Any]) -> None:
    del header["__metadata__"]["bitfold"]["modules"]["up"]["weights"][0]["shape"]


BAD: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "missing tensor": (rename, r"lacks the tensor 'up\.codes'"),
    "wrong shape": (reshape, r"tensor 'up\.codes' is U8\[32, 128\] but its header says U8\[128, 32\]"),
    "a shape that no format has": (reshape_both, r"tensor 'up\.\w+' is .* wants"),
    "newer": (newer, r"saved by a newer bitfold \(7\.1, file version 99\).*upgrade"),
    "damaged header": (damaged, r"damaged bitfold header \(KeyError: 'shape'\)"),
    "code": (foreign, r"calls 'os\.system', which is not an operator"),
    "injected name": (injected, "is not a name"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(tmp_path: Path, case: str) -> None:
    edit, message = BAD[case]
    path = tmp_path / "m.safetensors"
    saved(path)
    header_edit(path, edit)
    model = Model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(bf.BitfoldError, match=message):
        bf.load(path, into=model, target="reference")
    now = model.state_dict()
    assert list(now) == list(before) and all(torch.equal(now[name], before[name]) for name in before)
    assert type(model.up) is nn.Linear


@pytest.mark.parametrize("keep", [0, 5, 100, -100])
def test_truncated(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "m.safetensors"
    saved(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(bf.BitfoldError, match="truncated or is not a safetensors file"):
        bf.load(path, into=skeleton())


def test_wrong_skeletons(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    saved(path)
    with pytest.raises(bf.BitfoldError, match=r"embed\.weight has shape \[50, 32\] here and \[50, 64\]"):
        bf.load(path, into=skeleton(32))
    with pytest.raises(bf.BitfoldError, match="has a module 'embed' that this Sequential does not have"):
        bf.load(path, into=nn.Sequential())
    longer = skeleton()
    longer.extra = nn.Linear(4, 4)
    with pytest.raises(bf.BitfoldError, match=r"no tensor for 'extra\.weight'"):
        bf.load(path, into=longer)
    other = skeleton()
    other.up = nn.Conv1d(64, 128, 1)
    with pytest.raises(bf.BitfoldError, match="up is a Conv1d here and a Linear in"):
        bf.load(path, into=other)
    with pytest.raises(bf.BitfoldError, match="weights of a Model; give its skeleton"):
        bf.load(path)


def test_what_is_no_file_of_ours(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(bf.BitfoldError, match="there is no file"):
        bf.load(tmp_path / "none.safetensors")
    save_file({"w": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(bf.BitfoldError, match="was not saved by bitfold"):
        bf.load(tmp_path / "w.safetensors")
    with pytest.raises(bf.BitfoldError, match="nothing in this Linear is quantized"):
        bf.save(nn.Linear(2, 2), tmp_path / "x.safetensors")
    with pytest.raises(bf.BitfoldError, match="this graph is captured"):
        bf.save(bf.capture(nn.Linear(2, 2), (torch.zeros(1, 2),)), tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    path = tmp_path / "m.safetensors"
    model = saved(path)
    before = path.read_bytes()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(bf.BitfoldError, match="cannot be written: No space left on device"):
        bf.save(model, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    with pytest.raises(bf.BitfoldError, match="cannot be written"):
        bf.save(model, tmp_path / "no" / "m.safetensors")
