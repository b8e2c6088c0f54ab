"""Modules that train on rounded numbers: what `bf.prepare_qat` makes of an `nn.Linear`, in place.

In: a module, and the graph of its forward with `train_quantize` nodes. Out: the same module object, of a
class that is still an `nn.Linear`: its parameters are the same objects, its forward rounds them.

    nn.Linear(weight, bias)  ->  PreparedLinear(weight, bias, weight_step)
                                 forward(x) = body(weight, bias, weight_step, x)

There are two bodies, for `.train()` and for `.eval()` (four with a batch norm), that hold no tensor: what
the rounding needs beside the module's own tensors (learned scales, ranges, a step counter) are parameters
and buffers of the module, in its `state_dict`, float32 whatever `.to(dtype)` says. An extra state says what
all of them were trained as; a state dict that says otherwise is not loaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.fx import GraphModule
from torch.nn.modules.batchnorm import _BatchNorm

from ...formats import BitfoldError
from ...passes.training.quantizers import CLOCK
from ..folded import check_ranks, keeping_dtype
from .bodies import BODIES, Bodies
from .preparation import Preparation
from .trained_as import as_bytes, check_trained_as


class Prepared(nn.Module):
    """What all prepared modules share. Made by `prepare_module`, never called."""

    body: GraphModule
    still: GraphModule
    operands: tuple[str, ...]
    extra: tuple[str, ...]
    arguments: tuple[str, ...]
    ranks: tuple[int, ...] | None
    preparation: Preparation
    own_forward: dict[str, Any]
    folded_norm: tuple[nn.Module, ...]
    folded_into: tuple[nn.Module, ...]
    is_prepared = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs:
            names = self.arguments[len(args) : len(args) + len(kwargs)]
            if set(names) != set(kwargs):
                raise TypeError(
                    f"{type(self).__name__} takes {list(self.arguments)} and got {len(args)} in order and "
                    f"{list(kwargs)}"
                )
            args = (*args, *(kwargs[name] for name in names))
        if self.ranks is not None:
            check_ranks(self, self.ranks, args)
        body: Any = self.body if self.training else self.still
        if self.folded_norm:
            norm = self.folded_norm[0]
            modes = (self.training, norm.training)
            body = next(self._modules[name] for name, when in BODIES.items() if when == modes)
            if norm.training:
                _count(norm)
        operands = [self._operand(name) for name in self.operands]
        if self.folded_norm and any(isinstance(operand, DTensor) for operand in operands):
            raise BitfoldError(
                f"the batch norm that trains within {self.preparation.path} is sharded apart from it; let "
                "fully_shard take both in one unit"
            )
        return body(*operands, *args)

    def _operand(self, name: str) -> Any:
        """A tensor of this module; `norm.…`: a tensor or number of the batch norm that is folded into it."""
        owner, dot, rest = name.partition(".")
        if not dot:
            return getattr(self, owner)
        norm: Any = self.folded_norm[0]
        if name == "norm.momentum" and norm.momentum is None:  # the mean over all batches, as in torch
            return 1.0 / max(float(norm.num_batches_tracked), 1.0)
        return getattr(norm, rest)

    def get_extra_state(self) -> Any:
        """What the module trains as, as the bytes of a text; beside it the state that the original class has
        of its own, if any."""
        original: Any = unprepared_class(self)
        if original.get_extra_state is nn.Module.get_extra_state:
            return self._as_bytes()
        return {"trains": self._as_bytes(), "own": original.get_extra_state(self)}

    def _as_bytes(self) -> Tensor:
        return as_bytes(self.preparation.trains, self.preparation.teacher)

    def set_extra_state(self, state: Any) -> None:
        """Give the original class what is its own; `_load_from_state_dict` has looked at the text."""
        original: Any = unprepared_class(self)
        if isinstance(state, dict):
            original.set_extra_state(self, state["own"])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        about = self.preparation
        check_trained_as(about.trains, state_dict.get(f"{prefix}_extra_state"), prefix, about.teacher)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if type(self) is not prepared_class(unprepared_class(self)):
            return super().__reduce_ex__(protocol)
        return _blank, (unprepared_class(self),), self.__dict__

    def extra_repr(self) -> str:
        return ", ".join(part for part in (super().extra_repr(), "prepared", *self.extra) if part)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        extra = [getattr(self, name) for name in self.extra]
        held = {id(tensor) for one in extra for tensor in (one, one.grad)}
        kept = keeping_dtype(fn)

        def apply(tensor: Tensor) -> Tensor:
            return (kept if id(tensor) in held else fn)(tensor)

        return super()._apply(apply, recurse)  # type: ignore[no-untyped-call]


class PreparedNorm(Prepared):
    """A batch norm that another module computes (`folded_into`), or that freezes."""

    def reset_running_stats(self) -> None:
        """As torch's; `update_bn` begins with it, and averages what then does not move. Raises BitfoldError
        once the statistics stand still."""
        freeze, (clocked, *_) = self.preparation.options.freeze_norm, (*self.folded_into, self)
        clock = clocked._buffers.get(CLOCK)
        if freeze is not None and clock is not None and not clock.is_meta and int(clock) >= freeze:
            raise BitfoldError(
                f"the statistics of {self.preparation.path} stand still since step {freeze} (freeze_norm), "
                "and a reset would stay; leave update_bn out, or call it before that step"
            )
        original: Any = super()
        original.reset_running_stats()


ATTRIBUTES = (*Prepared.__annotations__, *BODIES)
"""What a module must not have of its own."""


@cache
def prepared_class(original: type) -> type[Prepared]:
    """The class of a prepared `original`: a subclass of it."""
    base = PreparedNorm if issubclass(original, _BatchNorm) else Prepared
    return type(f"Prepared{original.__name__}", (base, original), {"__module__": __name__})


def unprepared_class(module: nn.Module) -> type:
    """The class that a module had before it was prepared (and maybe sharded)."""
    classes = (cls for cls in type(module).__mro__ if issubclass(cls, nn.Module))
    return next(cls for cls in classes if not issubclass(cls, Prepared) and not _is_shard(cls))


def _is_shard(cls: type) -> bool:
    """Whether fully_shard made the class: it gives a module one whose bases are its own and FSDPModule."""
    return issubclass(cls, FSDPModule)


def _blank(original: type) -> Prepared:
    cls = prepared_class(original)
    return cls.__new__(cls)


def prepare_module(
    module: nn.Module,
    bodies: Bodies,
    operands: tuple[str, ...],
    extra: Mapping[str, Tensor],
    preparation: Preparation,
    ranks: tuple[int, ...] | None,
    norm: nn.Module | None = None,
) -> None:
    """Turn `module`, in place, into a prepared one. `operands`: the bodies' leading inputs by their names in
    the module; `extra`: those that it does not have yet; `norm`: the batch norm that it computes too, which
    stays a module of the model's and is no child of this one."""
    arguments = tuple(inspect.signature(module.forward).parameters)
    for name, tensor in extra.items():
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(name, tensor)
        else:
            module.register_buffer(name, tensor)
    own = {
        name: module.__dict__.pop(name) for name in ("forward", "_conv_forward") if name in module.__dict__
    }
    module.operands, module.extra = operands, tuple(extra)  # type: ignore[assignment]
    module.arguments, module.ranks = arguments, ranks  # type: ignore[assignment]
    module.preparation, module.own_forward = preparation, own  # type: ignore[assignment]
    module.__dict__["folded_norm"] = () if norm is None else (norm,)
    module.__dict__["folded_into"] = ()
    module._modules.update(zip(BODIES, bodies, strict=False))
    original: type = type(module)
    module.__class__ = prepared_class(original)


def _count(norm: nn.Module) -> None:
    """A batch for a batch norm that is computed elsewhere."""
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)  # type: ignore[operator]


def check_norms(model: nn.Module) -> None:
    """Raises BitfoldError if a batch norm that is folded into a convolution is not in the model any more, or
    one that freezes was made anew: its children went along, and its freezing did not."""
    here = set(model.modules())
    for path, module in model.named_modules():
        if isinstance(module, Prepared) and not here.issuperset(module.folded_norm):
            raise BitfoldError(
                f"the batch norm that trains within {path} has left the model, and what took its place "
                "normalizes once more; convert_sync_batchnorm, say, goes before bf.prepare_qat"
            )
        if isinstance(module, _BatchNorm) and not isinstance(module, Prepared) and "still" in module._modules:
            raise BitfoldError(
                f"{path or 'the model'}, a batch norm that freezes, was made a {type(module).__name__}, "
                "whose statistics move on; convert_sync_batchnorm goes before bf.prepare_qat"
            )
