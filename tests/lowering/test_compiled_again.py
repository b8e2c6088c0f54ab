"""A compiled quantized model follows what is done to the model afterwards, as eager does."""

from __future__ import annotations

import copy
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitfold as bf

pytestmark = pytest.mark.slow


def made(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64, bias=False), nn.LayerNorm(64), nn.Linear(64, 8)
    model: nn.Module = bf.quantize(nn.Sequential(*layers).eval(), "int8")
    return model


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="bitfold", options={"recipe": "none"})


X = torch.randn(3, 64, generator=torch.Generator().manual_seed(7))


def agree(fast: Any, model: nn.Module, x: Tensor = X) -> None:
    # Rounding once more or less in x's dtype, of values below 2.
    torch.testing.assert_close(fast(x), model(x), rtol=0, atol=16 * torch.finfo(x.dtype).eps)


def test_in_every_mode_and_dtype_and_as_a_copy() -> None:
    model = made(0)
    fast = compiled(model)
    for mode in (torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            agree(fast, model)
    refused = pytest.raises(Exception, match=r"torch\.autocast")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), refused:
        compiled(made(0))(X)
    with torch.no_grad():
        agree(compiled(copy.deepcopy(model)), model)
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            agree(fast, model.to(dtype), X.to(dtype))


@pytest.mark.parametrize("assign", [False, True])
def test_with_the_state_of_another(assign: bool) -> None:
    model, other = made(0), made(1)
    fast = compiled(model)
    with torch.inference_mode():
        agree(fast, model)
    model.load_state_dict(other.state_dict(), assign=assign)
    with torch.inference_mode():
        agree(fast, other)


def test_from_threads_that_all_make_the_first_call() -> None:
    model = made(0)
    fast, wrong = compiled(model), list[Any]()
    xs = [torch.randn(3, 64, generator=torch.Generator().manual_seed(i)) for i in range(4)]

    def work(x: Tensor) -> None:
        with torch.no_grad():
            try:
                for _ in range(20):
                    agree(fast, model, x)
            except BaseException as error:
                wrong.append(error)

    threads = [Thread(target=work, args=(x,)) for x in xs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
