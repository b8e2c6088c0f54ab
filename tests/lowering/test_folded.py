"""Folded modules in the world: copies, dtypes, state dicts, generate, adapters, sharding, torch.compile."""

import copy
import io
import os
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import bitfold as bf
from bitfold.lowering import Folded, FoldedLinear


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64, bias=False)
        self.lm_head = nn.Linear(64, 50, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.lm_head(x + self.down(torch.relu(self.up(x))))


TOKENS = torch.arange(10).reshape(2, 5)


def quantized(recipe: str = "int8_all", target: str = "reference") -> Small:
    torch.manual_seed(0)
    return bf.quantize(Small(), recipe, target=target)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval()  # type: ignore[no-any-return]


def fake_quantized(model: nn.Module, text: str) -> nn.Module:
    """A copy whose linears, heads excepted, hold rounded floats."""
    twin, fmt = copy.deepcopy(model), bf.format(text)
    for path, module in twin.named_modules():
        if isinstance(module, nn.Linear) and "head" not in path:
            with torch.no_grad():
                module.weight.copy_(fmt.dequantize(fmt.quantize(module.weight)))
    return twin


def test_deepcopy_is_independent_and_keeps_ties() -> None:
    model = quantized()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(TOKENS), model(TOKENS))
    assert twin.lm_head.codes is twin.embed.codes and twin.up.codes is not model.up.codes
    with torch.no_grad():
        twin.up.codes.zero_()
    assert not torch.equal(twin(TOKENS), model(TOKENS))
    assert twin.up.body is not model.up.body


@pytest.mark.parametrize("target", ["reference", "cpu"])
@pytest.mark.parametrize("recipe", ["int8_all", "int4[g32]", "nvfp4", "mxfp8"])
def test_scales_keep_their_dtype_through_to(recipe: str, target: str) -> None:
    model = quantized(recipe, target)
    before = {name: p.clone() for name, p in model.up.named_parameters() if name in model.up.parts}
    model.to(torch.bfloat16)
    for name, part in before.items():
        now = getattr(model.up, name)
        assert now.dtype == part.dtype and now.view(torch.uint8).equal(part.view(torch.uint8)), name
    assert model.up.bias.dtype == torch.bfloat16 and model.up.weight.dtype == torch.bfloat16
    out = model(TOKENS)
    assert out.dtype == torch.bfloat16 and bool(torch.isfinite(out).all())
    weight = model.up.weight
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    # bf16 carries 8 bits: one rounding of each of two sums, and of the weight on the way that decodes in
    # float32
    torch.testing.assert_close(
        model.up(x), nn.functional.linear(x, weight, model.up.bias), rtol=2**-6, atol=2**-4
    )
    model.float()
    assert model.up.weight.dtype == torch.float32 and model(TOKENS).dtype == torch.float32


def test_to_empty_and_meta_move_everything() -> None:
    model = quantized("int4[g32]").to("meta")
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    assert model.up.codes.dtype == torch.uint8 and model.up.scales.dtype == torch.bfloat16


def test_state_dict_round_trip() -> None:
    model = quantized()
    other = bf.quantize(Small(), "int8_all", target="reference")
    assert not torch.equal(other(TOKENS), model(TOKENS))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(TOKENS), model(TOKENS))


@pytest.mark.parametrize(("theirs", "ours"), [("cpu", "reference"), ("reference", "cpu")])
def test_a_state_dict_of_another_target_is_laid_out_anew(theirs: str, ours: str) -> None:
    model, other = quantized("int4[g32]", theirs), bf.quantize(Small(), "int4[g32]", target=ours)
    assert model.up.folded_weights[0].format != other.up.folded_weights[0].format
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.up.weight, model.up.weight)
    assert torch.equal(other.down.weight, model.down.weight)


def test_a_state_dict_in_another_format_is_refused() -> None:
    with pytest.raises(
        (bf.BitfoldError, RuntimeError), match=r"up\.weight is int8 and the state dict has uint8\[zero\]"
    ):
        quantized("int8").load_state_dict(quantized("uint8[zero]").state_dict())


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_copies_and_pickles_of_a_class_made_on_the_way() -> None:
    model = bf.quantize(Doubled(8, 4), "int8", target="reference")
    x = torch.randn(3, 8)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert isinstance(twin, Doubled) and type(twin).__name__ == "FoldedDoubled"
        assert torch.equal(twin(x), model(x))


def test_the_decoded_weight_is_read_only() -> None:
    model = quantized()
    with pytest.raises(bf.BitfoldError, match="adapter cannot be merged"):
        model.up.weight.data += 1
    with pytest.raises(bf.BitfoldError, match="adapter cannot be merged"):
        model.up.weight.add_(1)
    with pytest.raises(bf.BitfoldError, match="cannot be replaced"):
        model.up.weight = torch.zeros(3)
    assert type(model.up.weight + 1) is Tensor


WRITES: dict[str, Callable[[Tensor], object]] = {
    "data": lambda w: w.data.mul_(2),
    "data item": lambda w: w.data.__setitem__(0, 1.0),
    "data slice": lambda w: w[2:].data[0].fill_(1),
    "view": lambda w: w.view(-1).zero_(),
    "row": lambda w: w[0].__setitem__(1, 5.0),
    "detach": lambda w: w.detach().add_(1),
    "transpose": lambda w: w.mT.zero_(),
    "same dtype": lambda w: w.float().cpu().contiguous().zero_(),
    "chunk": lambda w: w.chunk(2)[1].zero_(),
    "rows": lambda w: [row.zero_() for row in w],
    "out": lambda w: torch.neg(w[0], out=w[0]),
    "foreach": lambda w: torch._foreach_mul_([w], 2),
    "init": nn.init.normal_,
    "init of data": lambda w: nn.init.kaiming_uniform_(w.data),
    "assignment": lambda w: w.__itruediv__(2),
    "parameter": lambda w: torch.optim.SGD([nn.Parameter(w)], 0.1).param_groups[0]["params"][0].data.zero_(),
}


@pytest.mark.parametrize("case", WRITES)
def test_a_write_through_a_view_of_the_decoded_weight_raises(case: str) -> None:
    weight = quantized().up.weight
    before = weight.clone()
    with torch.no_grad(), pytest.raises(bf.BitfoldError, match=r"would be lost .* a copy, weight\.clone\(\)"):
        WRITES[case](weight)
    assert torch.equal(weight, before)


def test_what_is_read_from_the_decoded_weight_is_the_readers_own() -> None:
    weight = quantized().up.weight
    with pytest.raises(ValueError, match="read-only"):
        weight.numpy().fill(0)
    buffer = io.BytesIO()
    torch.save({"w": weight, "row": weight[0]}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    copies = [copy.deepcopy(weight), weight.clone(), weight.to(torch.bfloat16), weight[0] + 1, saved["w"]]
    copies += [
        torch.zeros(128, 64).copy_(weight),
        nn.Parameter(weight.clone()).data,
        weight.sum(0),
        saved["row"],
    ]
    copies += [
        torch.cat([weight, weight]),
        nn.functional.linear(torch.ones(2, 64), weight),
        weight.max(0).values,
    ]
    assert [type(one) for one in copies] == [Tensor] * len(copies)
    before = weight.clone()
    for one in copies:
        one.zero_()
    assert torch.equal(weight, before) and torch.equal(saved["row"], torch.zeros(64))


def test_generate(llama: nn.Module) -> None:
    expected = fake_quantized(llama, "int4[g32]")
    model = bf.quantize(copy.deepcopy(llama), "int4[g32]", target="reference")
    prompt = torch.tensor([[1, 5, 7]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ours = model.generate(prompt, **options)
    assert torch.equal(ours, expected.generate(prompt, **options)) and ours.shape == (1, 11)
    assert torch.equal(model(prompt).logits, expected(prompt).logits)


def test_a_lora_adapter_trains_on_top(llama: nn.Module) -> None:
    peft = pytest.importorskip("peft")
    base = bf.quantize(copy.deepcopy(llama), "int8", target="reference")
    codes = base.model.layers[0].self_attn.q_proj.codes.clone()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    prompt = torch.tensor([[1, 5, 7, 9]])
    assert torch.equal(model(prompt).logits, base(prompt).logits)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):
        loss = model(prompt, labels=prompt).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[2] < losses[0]
    layer = (
        base.model.model.layers[0].self_attn.q_proj
        if hasattr(base.model, "model")
        else base.model.layers[0].self_attn.q_proj
    )
    assert isinstance(layer.base_layer, FoldedLinear) and torch.equal(layer.base_layer.codes, codes)
    assert model.generate(input_ids=prompt, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (1, 6)
    with pytest.raises(bf.BitfoldError, match="merge it before"):
        model.merge_adapter()


@pytest.fixture
def process_group() -> Iterator[None]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29533", RANK="0", WORLD_SIZE="1")
    dist.init_process_group("gloo")
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_fully_shard(process_group: None, target: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = quantized("int4[g32]", target)
    expected = model(TOKENS)
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(model.up, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model.up.codes, DTensor) and model.up.codes.dtype == torch.uint8
    out = model(TOKENS)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert model.up.bias.grad is not None and model.up.codes.grad is None
    model.to(torch.bfloat16)
    assert model.up.scales.dtype == torch.bfloat16 and model.down.scales.dtype == torch.bfloat16
    with pytest.raises(bf.BitfoldError, match="sharded"):
        bf.save(model, "never.safetensors")


def test_plain_compile_has_no_graph_break() -> None:
    model = quantized("int8_all", "cpu")
    graphs: list[str] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(gm.code)
        return gm.forward

    with torch.no_grad():
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        assert torch.equal(compiled(TOKENS), model(TOKENS))
        compiled(TOKENS[:1])
    # The bodies are inlined: the kernels are in the graph, and parts are inputs.
    assert "bitfold.fused" in graphs[0] and len(graphs) <= 2


@pytest.mark.parametrize("how", ["quantize", "convert"])
def test_layers_that_are_alike_have_one_body(how: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3)), nn.Linear(32, 16))
    if how == "quantize":
        bf.quantize(model, "int4[g16]", target="cpu")
    else:
        bf.convert(bf.prepare_qat(model, "int4[g16]", bf.Qat("lsq")), target="cpu")
    assert model[0].body is model[1].body is model[2].body
    assert model[3].body is not model[0].body


def test_a_forward_is_spelled_out_and_stays_that_of_its_body() -> None:
    torch.manual_seed(0)
    layers = nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
    model, x = bf.quantize(nn.Sequential(*layers).eval(), "int8", target="cpu"), torch.randn(3, 64)
    assert type(model[0]) is type(model[2]) and type(model[0]) is not type(model[3])
    assert isinstance(model[0], FoldedLinear) and type(model[0]).__name__ == "FoldedLinear"
    for layer in (model[0], model[3]):
        assert torch.equal(layer(x), Folded.forward(layer, x))
        again = pickle.loads(pickle.dumps(layer))
        assert type(again) is type(layer) is type(copy.deepcopy(layer)) and torch.equal(again(x), layer(x))
    # Whoever puts a class of their own on top has the new body too, when the dtype changes.
    model[0].__class__ = type("Sharded", (type(model[0]),), {})
    model.bfloat16()
    assert model[0](x.bfloat16()).dtype == torch.bfloat16 and type(model[0]).__name__ == "Sharded"
    assert torch.equal(model[0](x.bfloat16()), Folded.forward(model[0], x.bfloat16()))
