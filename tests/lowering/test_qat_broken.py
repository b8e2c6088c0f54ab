"""What tries to break training on rounded numbers: odd models, odd data, odd orders of calls."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from qat_cases import step
from torch import Tensor, nn

import bitfold as bf
from bitfold.lowering.qat.prepared import Prepared
from bitfold.passes.rules import Rule

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
STATIC = bf.Recipe("static", (Rule(weight="int4", input="int8[tensor]", observer="minmax"),))


def made(k: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(k, 32), nn.GELU(), nn.Linear(32, k))


def trained(model: nn.Module, x: Tensor = X, steps: int = 2) -> nn.Module:
    optimizer = torch.optim.Adam(bf.parameter_groups(model, 1e-2, 1e-3))
    for _ in range(steps):
        step(model, x, optimizer)
    return model.eval()


def converts(model: nn.Module, x: Tensor = X) -> bool:
    """Whether the converted model gives the prepared one's bits."""
    model.eval()
    with torch.no_grad():
        expected = model(x)
        return torch.equal(bf.convert(model, target="reference")(x), expected)


@pytest.mark.parametrize("text", ["int3", "int2", "int8", "uint5[zero]", "float8_e4m3fn"])
def test_rows_of_an_odd_length(text: str) -> None:
    x = torch.randn(4, 33)
    assert converts(trained(bf.prepare_qat(made(33), text, bf.Qat("lsq")), x), x)


def test_a_frozen_weight_stays_and_its_scale_learns() -> None:
    model = made()
    model[0].weight.requires_grad_(False)
    bf.prepare_qat(model, "int4[g16]", bf.Qat("lsq"))
    weight, scale = (model[0].get_parameter(name).clone() for name in ("weight", "weight_step"))
    trained(model)
    assert torch.equal(model[0].weight, weight) and not torch.equal(model[0].weight_step, scale)
    assert converts(model)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_batch_that_is_no_number_moves_no_range(wrong: float) -> None:
    model = bf.prepare_qat(made(), STATIC, bf.Qat(observe=5))
    model(X)
    bf.advance(model)
    before = model[0].input_high.clone()
    bad = X.clone()
    bad[0, 0] = wrong
    model(bad)
    bf.advance(model)
    assert torch.equal(model[0].input_high, before) and converts(model)


def test_a_layer_that_is_never_called_is_named_and_the_model_stays() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = trained(bf.prepare_qat(Two(), STATIC, bf.Qat(observe=3)))
    expected = model(X)
    with pytest.raises(bf.BitfoldError, match="layer idle"):
        bf.convert(model)
    assert torch.equal(model(X), expected) and isinstance(model.used, Prepared)


def test_numbers_that_are_none_and_codes_are_refused() -> None:
    model = trained(bf.prepare_qat(made(), "int4[g16]"))
    kept = model[0].weight[0, 0].clone()
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.raises(bf.BitfoldError, match="layer 0"):
        bf.convert(model)
    with torch.no_grad():
        model[0].weight[0, 0] = kept
    assert converts(model)
    for call in (
        lambda: bf.prepare_qat(model, "int4[g16]"),
        lambda: bf.convert(model),
        lambda: bf.advance(model),
    ):
        with pytest.raises(bf.BitfoldError):
            call()


@pytest.mark.parametrize("gradient", ["lsq", "pact", "smooth:5", "clip"])
def test_rows_of_zeros_and_scales_that_went_astray(gradient: str) -> None:
    model = made()
    with torch.no_grad():
        model[0].weight[0].zero_()
        model[2].weight.zero_()
    bf.prepare_qat(model, "int4[g16]", bf.Qat(gradient))
    for name, parameter in model.named_parameters():
        if name in ("0.weight_step", "0.weight_end"):
            with torch.no_grad():
                parameter[1:4] = torch.tensor([-0.1, 0.0, 1e-30])[:, None]
    trained(model)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters()) and converts(model)


def test_an_empty_batch_and_half_precision() -> None:
    model = bf.prepare_qat(made(), STATIC, bf.Qat("lsq", "clip", observe=3))
    model(X[:0]).sum().backward()
    bf.advance(model)
    assert converts(trained(model))
    half = bf.prepare_qat(made().half(), "int4[g16]", bf.Qat("lsq"))
    step(half, X.half(), torch.optim.SGD(half.parameters(), 0.01))  # Adam's epsilon is 0 in float16
    assert converts(half, X.half())


def test_prepared_in_inference_mode_it_trains() -> None:
    model = made()
    with torch.inference_mode():
        bf.prepare_qat(model, "int4[g16]", bf.Qat("lsq"))
    assert converts(trained(model))


def test_a_second_preparation_that_fails_changes_nothing() -> None:
    model = trained(bf.prepare_qat(made(), "int4[g16]", bf.Qat("lsq", warmup=1)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(X).detach()
    scale = model[0].weight_step
    for wrong in ({}, made().state_dict()):
        with pytest.raises(bf.BitfoldError, match="only the model has"):
            bf.prepare_qat(model, "int2[g16]", bf.Qat("lsq", warmup=1), state=wrong, distill=bf.Distill())
        after = model.state_dict()
        assert set(after) == set(before) and all(torch.equal(after[name], before[name]) for name in before)
        assert model[0].weight_step is scale and torch.equal(model(X), expected)
        assert not model._forward_hooks and "bitfold_teacher" not in model.__dict__
    assert converts(model)


def test_ranges_that_a_later_recipe_adds_need_data() -> None:
    model = bf.prepare_qat(made(), "int4[g16]", bf.Qat(warmup=1))
    bf.advance(model)
    for how in (bf.Qat(), bf.Qat(observe=1)):  # one step is over
        with pytest.raises(bf.BitfoldError, match=r"layer 0 takes activations of calibrated range"):
            bf.prepare_qat(model, STATIC, how)
    inputs = STATIC.but(Rule(match="2", weight="int4"))
    bf.prepare_qat(model, inputs, bf.Qat(warmup=1), calibration=[X])
    with pytest.raises(bf.BitfoldError, match=r"layer 2 takes activations of calibrated range"):
        bf.prepare_qat(model, STATIC, bf.Qat(warmup=1))
    bf.prepare_qat(model, inputs, bf.Qat(warmup=1))
    assert converts(model)


def test_a_layer_that_a_later_recipe_adds_is_at_the_same_step() -> None:
    one = bf.Recipe("one", (Rule(match="0", weight="int4"),))
    model = bf.prepare_qat(made(), one, bf.Qat(warmup=9))
    for _ in range(3):
        bf.advance(model)
    bf.prepare_qat(model, "int4[g16]", bf.Qat(warmup=9))
    assert int(model[0].clock) == int(model[2].clock) == 3 and model[0].clock is not model[2].clock


def test_the_report_is_of_the_last_recipe() -> None:
    skips = bf.Recipe("skips", (Rule(weight="int4"), Rule(match="2", skip="it is sensitive")))
    model = bf.prepare_qat(made(), skips)
    bf.prepare_qat(model, skips)
    assert len(bf.report(model).misses) == 1
    bf.prepare_qat(model, "int4[g16]")
    assert not bf.report(model).misses


def test_gradients_that_are_held_follow_their_scales() -> None:
    model = bf.prepare_qat(made(), "int4[g16]", bf.Qat("lsq"))
    model(X).sum().backward()
    model.to(torch.bfloat16)
    assert model[0].weight_step.grad.dtype == torch.float32 and model[0].weight.grad.dtype == torch.bfloat16
    torch.optim.AdamW(bf.parameter_groups(model, 1e-3)).step()


def test_scales_of_another_dtype_are_named() -> None:
    model = bf.prepare_qat(made(), "int4[g16]", bf.Qat("lsq"))
    cast = {name: one.bfloat16() for name, one in model.named_parameters()}
    model.load_state_dict(cast, assign=True, strict=False)
    with pytest.raises(bf.BitfoldError, match=r"0.weight_step is torch.bfloat16"):
        bf.convert(model)
    assert isinstance(model[0], Prepared)


def test_a_linear_that_was_compiled_alone() -> None:
    torch._dynamo.reset()
    model = made()
    model[0].compile(backend="eager")
    bf.prepare_qat(model, "int4[g16]", bf.Qat("lsq"))
    trained(model)
    assert converts(model) and model[0]._compiled_call_impl is not None


class Odd(nn.Module):
    """A forward of its own, and an attribute."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 16))
        setattr(self, name, nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def test_an_attribute_in_the_way_is_named() -> None:
    model = nn.Sequential(Odd("norm"))
    assert converts(trained(bf.prepare_qat(model, "int4[g16]", example_inputs=(X,))))
    model = nn.Sequential(Odd("body"))
    with pytest.raises(bf.BitfoldError, match="attribute 'body'"):
        bf.prepare_qat(model, "int4[g16]", example_inputs=(X,))
    assert type(model[0]) is Odd


def test_the_fast_path_of_a_transformer_layer_reads_no_float_weight() -> None:
    """In evaluation torch's own layer would read the weights of its linears without calling them."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model, x = nn.TransformerEncoder(layer, 2), torch.randn(2, 5, 16)
    bf.prepare_qat(model, "int2[g16]", bf.Qat("lsq"))
    trained(model, x)
    with torch.no_grad():
        rounded = model(x)
    # With a gradient wanted no fast path is taken, that of attention included, which adds in another order:
    # 16 and 32 terms of float32 in two layers, where int2 moves what it rounds by tenths.
    assert torch.allclose(rounded, model(x.clone().requires_grad_()), atol=1e-5)
    assert converts(model, x)


def test_a_state_of_another_recipe_is_one_sentence_and_changes_nothing() -> None:
    state = bf.prepare_qat(made(), "int4[g16]", bf.Qat("lsq")).state_dict()
    for scope in ("module", "program"):
        options: dict[str, Any] = {"scope": scope} | ({"example_inputs": (X,)} if scope == "program" else {})
        for recipe, how in (("int4[g16]", bf.Qat()), ("int4[g8]", bf.Qat("lsq"))):
            model = made()
            before = copy.deepcopy(model.state_dict())
            with pytest.raises(bf.BitfoldError, match="state"):
                bf.prepare_qat(model, recipe, how, state=state, **options)
            assert type(model[0]) is nn.Linear and set(model.state_dict()) == set(before)
            assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_distributed_data_parallel(tmp_path: object) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = bf.prepare_qat(made(), STATIC, bf.Qat("lsq", "clip", observe=2))
        trained(nn.parallel.DistributedDataParallel(model))
        assert converts(model)
    finally:
        dist.destroy_process_group()


def test_ranges_are_those_of_all_processes(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process is played here; two real ones train in `test_two_processes_share_a_model`."""
    import torch.distributed as dist

    theirs = torch.tensor([-9.0, -1.0, 0.0, math.nan])  # least, largest negated, of both layers
    asked = []

    def together(mine: Tensor, how: object, group: object) -> None:
        asked.append(mine.clone())
        mine.copy_(torch.minimum(mine, torch.where(theirs.isnan(), -math.inf, theirs)))

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = bf.prepare_qat(made(), STATIC, bf.Qat(observe=2))
        wrapped = nn.parallel.DistributedDataParallel(model)
        monkeypatch.setattr(dist, "all_reduce", together)
        monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
        wrapped(X)
        bf.advance(model)  # without the wrapper nobody knows of the others
        assert not asked
        before = model[2].input_high.clone()
        wrapped(X)
        bf.advance(wrapped)
        # The first layer goes a tenth of the way; the second saw what is no number, elsewhere, and stays.
        assert torch.equal(asked[0][:2], torch.stack([X.min(), -X.max()]))
        assert torch.equal(model[0].input_low, X.min() + 0.1 * (-9.0 - X.min()).reshape(1, 1))
        assert torch.equal(model[2].input_high, before) and bool(before.isfinite())
        wrapped(torch.full_like(X, math.nan))
        bf.advance(wrapped)
        assert not asked[1].isnan().any() and bool((asked[1] == -math.inf).any())
    finally:
        dist.destroy_process_group()


def _shard(rank: int, folder: str) -> None:
    """One of two processes that train a model together, against a third model that trains alone."""
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    # 31 rows: the processes' shares differ in size.
    torch.manual_seed(0)
    alone = nn.Sequential(nn.Linear(16, 31), nn.GELU(), nn.Linear(31, 16))
    rules = Rule(weight="int4[row]", input="int8"), Rule(match="2", weight="int4[tensor]")
    bf.prepare_qat(alone, bf.Recipe("r", rules), bf.Qat("lsq", warmup=1))  # then scales begin anew
    together = copy.deepcopy(alone)
    for layer in (together[0], together[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(together, mesh=mesh)
    for model in (alone, together):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            model(X).square().mean().backward()  # the same batch in both: their mean is the one's gradient
            optimizer.step()
            optimizer.zero_grad()
            bf.advance(model)
    state = get_model_state_dict(together, options=StateDictOptions(full_state_dict=True))
    for name, tensor in alone.state_dict().items():
        if rank == 0:
            assert torch.allclose(state[name], tensor, atol=1e-6), name
    for kind in ("sharded", "copied"):
        model = bf.prepare_qat(made(), STATIC, bf.Qat(observe=5))
        if kind == "sharded":
            for layer in (model[0], model[2], model):
                fully_shard(layer, mesh=mesh)
        wrapped = model if kind == "sharded" else nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            wrapped((1 + 9 * rank) * X)  # the second process's data are ten times as large
            bf.advance(wrapped)
        assert torch.equal(model[0].input_high, 10 * X.max().reshape(1, 1)), kind
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_a_model(tmp_path: object) -> None:
    import torch.multiprocessing as processes

    processes.spawn(_shard, (str(tmp_path),), nprocs=2)
