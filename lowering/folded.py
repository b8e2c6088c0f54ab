"""Modules whose weights are folded: what `bf.quantize` makes of an `nn.Linear`, in place.

In: a module, the graph of its forward with every tensor as an input, and the codes and scales. Out: the same
module object, of a class that is still an `nn.Linear`, with `codes` and `scales` in place of `weight`.

    nn.Linear(weight [N, K])   ->   FoldedLinear(codes [N, K/2] uint8, scales [N, K/128] bfloat16, bias, body)

The body holds no tensor: parts are parameters of the module (so that FSDP2 shards them, `state_dict` saves
them) and go into it in each call. `weight` is decoded when somebody asks for it, and is read-only.

Dynamo traces a call of a GraphModule through a dozen of torch's own functions, and guards what it reads on
the way: for thirty layers an eighth of its work. It sees the body's function alone, and of a layer with one
input a forward that is spelled out (`straight_forward.py`).
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..formats import BitfoldError, Quantized, format
from .folded_weight import Canonical, FoldedWeight
from .laid_anew import laid_anew
from .read_only import ReadOnly
from .retype import retyped, retyped_body
from .straight_forward import plain_class, straight_class


class Folded(nn.Module):
    """What all folded modules share. Made by `fold_module`, never called."""

    body: GraphModule
    folded_weights: tuple[FoldedWeight, ...]
    operands: tuple[str, ...]
    parts: tuple[str, ...]
    compute_dtype: torch.dtype
    canonical: Canonical
    arguments: tuple[str, ...]
    replaced_forward: bool
    run: Callable[..., Any] | None  # the body's function, if it needs no `self`
    ranks: tuple[int, ...] | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs:
            args = (*args, *self._positional(len(args), kwargs))
        if self.ranks is not None:
            check_ranks(self, self.ranks, args)
        operands = [getattr(self, name) for name in self.operands]
        return self.body(*operands, *args) if self.run is None else self.run(None, *operands, *args)

    def take_body(self, body: GraphModule) -> None:
        """Run `body` from now on."""
        alone = all(node.op in ("placeholder", "call_function", "output") for node in body.graph.nodes)
        self._modules["body"] = body
        self.run = type(body).forward if alone else None
        self.ranks = self.canonical.ranks
        straight = alone and self.ranks is None and self.arguments == ("input",)
        straight = straight and not isinstance(self, FoldedConv)
        made = straight_class(type(self), body.graph if straight else None, self.operands, Folded.forward)
        self.__class__ = made

    def _positional(self, given: int, kwargs: dict[str, Any]) -> list[Any]:
        """Keyword arguments in the order of the original forward, which is that of the body."""
        names = self.arguments[given : given + len(kwargs)]
        if set(names) != set(kwargs):
            raise TypeError(
                f"{type(self).__name__} takes {list(self.arguments)} and got {given} in order and "
                f"{list(kwargs)}"
            )
        return [kwargs[name] for name in names]

    def quantized(self, weight: FoldedWeight) -> Quantized:
        """The codes and scales of one folded weight, as they lie here."""
        return Quantized.from_parts(
            format(weight.format), [getattr(self, part) for part in weight.parts], weight.k
        )

    def decoded(self, name: str) -> Tensor:
        """The folded parameter `name` in its own shape and the module's compute dtype."""
        ways = [one for one in self.folded_weights if one.name == name]
        weight = next((one for one in ways if one.back is not None), ways[0])
        parts = [getattr(self, part) for part in weight.parts]
        with torch.no_grad():
            rows = torch.ops.bitfold.dequantize(parts, weight.format, weight.k, self.compute_dtype)
            value = weight.restore(rows)
        return value if torch.compiler.is_compiling() else value.as_subclass(ReadOnly)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A class made by `folded_class` has no name to be found by: it is made again in the same way.
        names = _decoded_names(self.folded_weights, self.operands)
        original: type = original_class(self)
        if plain_class(type(self)) is not folded_class(original, names):
            return super().__reduce_ex__(protocol)
        return _blank, (original, names), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("run", "ranks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        body, self.folded_weights, self._parameters = laid_anew(
            self.body, self.folded_weights, self._parameters
        )
        self.take_body(body)

    def unfold(self) -> None:
        """Be an unquantized module again, in place, without the folded parameters: others will be loaded."""
        for name in self.parts:
            del self._parameters[name]
        del self._modules["body"]
        for name in Folded.__annotations__:
            self.__dict__.pop(name, None)
        self.__class__ = original_class(self)  # type: ignore[assignment]

    def extra_repr(self) -> str:
        folded = ", ".join(f"{weight.name}={weight.format}" for weight in self.folded_weights)
        return ", ".join(part for part in (super().extra_repr(), folded) if part)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # `.to(dtype)` is for activations: codes and scales keep theirs, and the body computes in the new one.
        parts = {id(self._parameters[name]) for name in self.parts}
        kept = keeping_dtype(fn)

        def apply(tensor: Tensor) -> Tensor:
            return (kept if id(tensor) in parts else fn)(tensor)

        result = super()._apply(apply, recurse)  # type: ignore[no-untyped-call]
        self.compute_in(fn(torch.empty(0, dtype=self.compute_dtype)).dtype)
        return result

    def compute_in(self, dtype: torch.dtype) -> None:
        """Decode to `dtype` from now on; as it was for a dtype that is no float."""
        if dtype == self.compute_dtype or not dtype.is_floating_point:
            return
        graph = retyped(self.canonical.graph, self.compute_dtype, dtype)
        self.canonical = replace(self.canonical, graph=graph)
        self.take_body(retyped_body(self.body, self.compute_dtype, dtype))
        self.compute_dtype = dtype

    def get_extra_state(self) -> Any:
        """The formats of the parts, layouts included, as the bytes of a JSON text; beside it the state that
        the original class has of its own, if any.
        """
        text = json.dumps({weight.name: weight.format for weight in self.folded_weights})
        formats = torch.tensor(list(text.encode()), dtype=torch.uint8)
        if original_class(self).get_extra_state is nn.Module.get_extra_state:
            return formats
        return {"formats": formats, "own": own_extra_state(self)}

    def set_extra_state(self, state: Any) -> None:
        """Give the original class what is its own; `_load_from_state_dict` has looked at the formats."""
        if isinstance(state, dict):
            original_class(self).set_extra_state(self, state["own"])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        saved = state_dict.get(prefix + "_extra_state")
        saved = saved.get("formats") if isinstance(saved, dict) else saved
        if isinstance(saved, Tensor):
            formats = json.loads(bytes(saved.cpu().tolist()))
            for weight in self.folded_weights:
                self._adopt_layout(state_dict, prefix, weight, formats.get(weight.name))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _adopt_layout(
        self, state_dict: dict[str, Any], prefix: str, weight: FoldedWeight, saved: str | None
    ) -> None:
        """Bring parts in another layout, of another target, into this one. Raises for another format."""
        if saved is None or saved == weight.format:
            return
        theirs, ours = format(saved), format(weight.format)
        if str(theirs.with_layout(ours.layout)) != str(ours):
            raise BitfoldError(
                f"{prefix}{weight.name} is {ours} and the state dict has {theirs}; quantize with the same "
                "recipe first"
            )
        keys = [prefix + part for part in weight.parts]
        if all(key in state_dict for key in keys):
            quantized = Quantized.from_parts(theirs, [state_dict[key] for key in keys], weight.k)
            state_dict.update(zip(keys, theirs.relayout(quantized, ours.layout).parts, strict=True))


def keeping_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What `Module.to` does to a tensor, but for the dtype: seen as integers, floats pass any conversion of
    floats, and still move between devices.
    """

    def kept(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return fn(tensor)
        return fn(tensor.view(_BITS[tensor.element_size()])).view(tensor.dtype)

    return kept


def check_ranks(module: nn.Module, ranks: tuple[int, ...], args: tuple[Any, ...]) -> None:
    """Raises BitfoldError for inputs of other numbers of dimensions than those that a graph holds for."""
    found = tuple(value.ndim if isinstance(value, Tensor) else -1 for value in args)
    if found != ranks:
        raise BitfoldError(
            f"this {type(module).__name__} was traced with inputs of {list(ranks)} dimensions and is called "
            f"with {list(found)}; quantize the model with example_inputs of the rank that it will get"
        )


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _decoding(name: str) -> property:
    def read(self: Folded) -> Tensor:
        return self.decoded(name)

    def write(self: Folded, value: Any) -> None:
        raise BitfoldError(
            f"{name!r} of a folded {type(self).__name__} cannot be replaced; quantize the model anew"
        )

    return property(read, write, doc=f"`{name}`, decoded from its codes when asked for; a write raises.")


class FoldedLinear(Folded, nn.Linear):
    """An `nn.Linear` on codes."""

    weight = _decoding("weight")


class FoldedEmbedding(Folded, nn.Embedding):
    """An `nn.Embedding` on codes."""

    weight = _decoding("weight")


class FoldedConv(Folded):
    """A convolution on codes: x may be one image without a batch, as of torch's own; graphs have a batch."""

    kernel_size: tuple[int, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs.get("input")
        if not isinstance(x, Tensor) or x.ndim != len(self.kernel_size) + 1:
            return super().forward(*args, **kwargs)
        rest = {name: value for name, value in kwargs.items() if name != "input"}
        return super().forward(x.unsqueeze(0), *args[1:], **rest).squeeze(0)


class FoldedConv1d(FoldedConv, nn.Conv1d):
    """An `nn.Conv1d` on codes."""

    weight = _decoding("weight")


class FoldedConv2d(FoldedConv, nn.Conv2d):
    """An `nn.Conv2d` on codes."""

    weight = _decoding("weight")


_NAMED: dict[tuple[type, tuple[str, ...]], type[Folded]] = {
    (nn.Linear, ("weight",)): FoldedLinear,
    (nn.Embedding, ("weight",)): FoldedEmbedding,
    (nn.Conv1d, ("weight",)): FoldedConv1d,
    (nn.Conv2d, ("weight",)): FoldedConv2d,
}


_STOCK_CONVOLUTIONS = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


@cache
def folded_class(original: type, names: tuple[str, ...]) -> type[Folded]:
    """The class of a folded `original`: a subclass of it, with the folded parameters decoded on demand."""
    if (original, names) in _NAMED:
        return _NAMED[original, names]
    members = {name: _decoding(name) for name in names}
    base = FoldedConv if getattr(original, "forward", None) in _STOCK_CONVOLUTIONS else Folded
    return type(f"Folded{original.__name__}", (base, original), {"__module__": __name__, **members})


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before it was folded (or sharded)."""
    classes = (cls for cls in type(module).__mro__ if issubclass(cls, nn.Module) and cls is not nn.Module)
    return next((cls for cls in classes if not issubclass(cls, Folded)), nn.Module)


def own_extra_state(module: nn.Module) -> Any:
    """What `get_extra_state` of the module's own class gives, whether it is folded or not."""
    return original_class(module).get_extra_state(module)


def _blank(original: type, names: tuple[str, ...]) -> Folded:
    """A folded module without any state yet, for copies and pickles."""
    cls = folded_class(original, names)
    return cls.__new__(cls)


def fold_module(
    module: nn.Module,
    body: GraphModule,
    operands: Mapping[str, Tensor],
    weights: tuple[FoldedWeight, ...],
    compute_dtype: torch.dtype,
    canonical: Canonical,
) -> None:
    """Turn `module`, in place, into a folded one. `operands`: the body's leading inputs, by their names.

    Its hooks, its training flag and its other attributes stay; the folded parameters leave it, so that their
    memory is free as soon as nobody else holds them. One that the body reads as a float too stays. A forward
    of the instance's own goes: it is in the body. The body may be that of other modules too.
    """
    names = _decoded_names(weights, operands)
    original: type = type(module)
    cls = folded_class(original, names)
    for name in names:
        module._parameters.pop(name, None)
    new = {name: part for name, part in operands.items() if name not in module._parameters | module._buffers}
    for name, part in new.items():
        module._parameters[name] = (
            part if isinstance(part, nn.Parameter) else nn.Parameter(part, requires_grad=False)
        )
    module.parts = tuple(new)  # type: ignore[assignment]
    module.folded_weights = weights  # type: ignore[assignment]
    module.operands = tuple(operands)  # type: ignore[assignment]
    module.compute_dtype = compute_dtype  # type: ignore[assignment]
    module.canonical = canonical  # type: ignore[assignment]
    module.arguments = tuple(inspect.signature(module.forward).parameters)  # type: ignore[assignment]
    own = [method for method in ("forward", "_conv_forward") if module.__dict__.pop(method, None) is not None]
    module.replaced_forward = bool(own)  # type: ignore[assignment]
    module.__class__ = cls
    module.take_body(body)  # type: ignore[operator]


def _decoded_names(weights: tuple[FoldedWeight, ...], operands: Iterable[str]) -> tuple[str, ...]:
    """The parameters that are gone, so that reading them decodes."""
    kept = set(operands)
    return tuple(dict.fromkeys(weight.name for weight in weights if weight.name not in kept))
