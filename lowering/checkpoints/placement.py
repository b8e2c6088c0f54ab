"""What of a checkpoint goes where in its skeleton: checked against each other, then put in place.

In: a `Checkpoint` and a model of the same architecture, with numbers or on meta. Out: two tables by the first
of each parameter's paths; `write` puts the plain tensors in, and for each quantized weight a parameter that
holds its place.

    checkpoint: head.weight and embed.weight, int8, the same codes     skeleton: the two are tied
    ->          Placement.stored["embed.weight"]; other codes under the second name are refused
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...formats import BitfoldError, nearest
from ..files.skeleton import device_for, kind
from ..folded import Folded
from ..parameters import parameter_names
from .buffers import compute_buffers, computed_buffers
from .checkpoint import Checkpoint, Stored


@dataclass
class Placement:
    """What goes where. `stored` and `plain` hold each parameter once, by the first of its paths."""

    checkpoint: Checkpoint
    model: nn.Module
    given_device: torch.device | None

    def __post_init__(self) -> None:
        self.names = parameter_names(self.model)
        self.first = {path: paths[0] for paths in self.names.values() for path in paths}
        self.parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self.buffers = dict(self.model.named_buffers(remove_duplicate=False))
        self.plain: dict[str, Tensor] = {}
        self.stored: dict[str, Stored] = {}

    @property
    def device(self) -> torch.device:
        return device_for(self.model, self.given_device)

    def check(self) -> None:
        if any(isinstance(module, Folded) for module in self.model.modules()):
            raise BitfoldError(
                f"this {type(self.model).__name__} is quantized already; give the skeleton as it was before"
            )
        for path, stored in self.checkpoint.stored.items():
            shape = self._shape(path)
            if stored.weight.shape != shape:
                self._misshapen(path, tuple(stored.weight.shape), shape)
            damaged = [
                n
                for n, part in zip(stored.weight.format.parts, stored.weight.parts, strict=True)
                if n != "codes" and not _finite(part, n)
            ]
            if damaged:
                raise BitfoldError(
                    f"{path} has NaN or infinity among its {damaged[0]} in {self.checkpoint.source}; copy "
                    "the checkpoint again"
                )
            held = self.stored.setdefault(self.first[path], stored)
            if not _alike(held.weight.parts, stored.weight.parts):
                self._tied_apart(path)
        for path, tensor in self.checkpoint.plain.items():
            if path in self.buffers:
                self._check_buffer(path, tensor)
                continue
            shape = self._shape(path)
            if tensor.shape != shape:
                self._misshapen(path, tuple(tensor.shape), shape)
            if kind(tensor.dtype) != kind(self.parameters[path].dtype):
                self._of_another_kind(path, self.parameters[path], tensor)
            first = self.first[path]
            if first in self.stored or not _alike([self.plain.setdefault(first, tensor)], [tensor]):
                self._tied_apart(path)
        self._check_covered()

    def _shape(self, path: str) -> tuple[int, ...]:
        if path not in self.parameters:
            raise BitfoldError(
                f"{self.checkpoint.source} has a tensor {path!r} that this {type(self.model).__name__} "
                f"does not have{nearest(path, self.parameters)}"
            )
        return tuple(self.parameters[path].shape)

    def _check_buffer(self, path: str, tensor: Tensor) -> None:
        here = self.buffers[path]
        if tensor.shape != here.shape:
            self._misshapen(path, tuple(tensor.shape), tuple(here.shape))
        if kind(tensor.dtype) != kind(here.dtype):
            self._of_another_kind(path, here, tensor)

    def _of_another_kind(self, path: str, here: Tensor, tensor: Tensor) -> None:
        raise BitfoldError(
            f"{path} is {here.dtype} here and {tensor.dtype} in {self.checkpoint.source}, and numbers of "
            "one kind are not copied into another"
        )

    def _tied_apart(self, path: str) -> None:
        raise BitfoldError(
            f"{path} is one parameter with {self.first[path]} here, and {self.checkpoint.source} has other "
            "numbers for it; make the skeleton without that tie (tie_word_embeddings=False)"
        )

    def _misshapen(self, path: str, theirs: tuple[int, ...], ours: tuple[int, ...]) -> None:
        raise BitfoldError(
            f"{path} has shape {list(ours)} here and {list(theirs)} in {self.checkpoint.source}; make the "
            "skeleton with the configuration of that checkpoint"
        )

    def _check_covered(self) -> None:
        known = {*self.plain, *self.stored}
        missing = [name for name in dict.fromkeys(self.first.values()) if name not in known]
        known |= {*self.checkpoint.plain, *computed_buffers(self.model)}
        missing += [name for name, one in self.buffers.items() if one.is_meta and name not in known]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise BitfoldError(
                f"{self.checkpoint.source} has no tensor for {missing[0]!r}{more} of this "
                f"{type(self.model).__name__}; make the skeleton with the configuration of that checkpoint, "
                "and buffers that no checkpoint holds with numbers"
            )

    def write(self) -> None:
        """The plain tensors, and for each quantized weight one that holds its place; ties stay ties."""
        for paths in self.names.values():
            old = self.parameters[paths[0]]
            new = self._made(paths[0], old)
            for path in paths:
                self._set(path, new)
        for path in self.buffers:
            tensor = self.checkpoint.plain.get(path)
            if tensor is not None:
                dtype = tensor.dtype if self.buffers[path].is_meta else self.buffers[path].dtype
                module, name = self._owner(path)
                module._buffers[name] = tensor.to(self.device, dtype)
        compute_buffers(self.model, self.device)

    def _made(self, path: str, old: Tensor) -> nn.Parameter:
        if path in self.plain:
            tensor = self.plain[path]
            dtype = tensor.dtype if old.is_meta else old.dtype
            return nn.Parameter(tensor.to(self.device, dtype), requires_grad=old.requires_grad)
        dtype = old.dtype if not old.is_meta else self._computed_in(self.stored[path])
        one = torch.zeros((), dtype=dtype, device=self.device)
        return nn.Parameter(one.expand(old.shape), requires_grad=False)

    def _computed_in(self, stored: Stored) -> torch.dtype:
        """A skeleton on meta computes in what the checkpoint says, or in the dtype of most of its numbers
        that are not quantized; where it has none, in its 16-bit scales' dtype."""
        if self.checkpoint.dtype is not None and self.checkpoint.dtype.is_floating_point:
            return self.checkpoint.dtype
        counts: Counter[torch.dtype] = Counter()
        for tensor in self.plain.values():
            counts[tensor.dtype] += tensor.numel() if tensor.is_floating_point() else 0
        if counts.total():
            return counts.most_common(1)[0][0]
        scales = stored.weight.scales
        half = scales is not None and scales.dtype in (torch.bfloat16, torch.float16)
        return scales.dtype if scales is not None and half else torch.float32

    def _owner(self, path: str) -> tuple[nn.Module, str]:
        owner, _, name = path.rpartition(".")
        return self.model.get_submodule(owner), name

    def _set(self, path: str, parameter: nn.Parameter) -> None:
        module, name = self._owner(path)
        module._parameters[name] = parameter


def _alike(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether two names hold the same numbers."""
    return len(one) == len(other) and all(
        a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b)))
        for a, b in zip(one, other, strict=True)
    )


def _finite(part: Tensor, name: str) -> bool:
    """Whether every scale, and every zero point that is a float, is a number.
    In E8M0 the byte 255 is none."""
    if part.dtype is torch.uint8 and name == "scales":
        return not bool((part == 255).any())
    return not part.is_floating_point() or bool(torch.isfinite(part.to(torch.float32)).all())


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
