"""Distillation: the float model, as it was before, says what the rounded one should have said.

In: a model. Out: after each of its calls in training, a loss that draws its output to the float model's.

    bf.prepare_qat(model, "int4[g32]", distill=bf.Distill())
    loss = task(model(x)) + bf.distillation(model)

The teacher is a frozen copy in evaluation mode, called with the same arguments, and no part of the model:
neither its parameters nor its state dict know it, but for a hash of its numbers, by which a run that is
resumed knows it again. `bf.convert` lets it go.
"""

from __future__ import annotations

import copy
import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from ...formats import BitfoldError
from ..given_model import module_of

TEACHER = "bitfold_teacher"


@dataclass(frozen=True)
class Distill:
    """loss: "kl", of the softmax over the last dimension, or "mse"; temperature: of kl (Hinton et al.,
    1503.02531, whose factor of its square is in); weight: a factor of the loss."""

    loss: str = "kl"
    temperature: float = 1.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.loss not in ("kl", "mse"):
            raise BitfoldError(f"a distillation loss is 'kl' or 'mse', not {self.loss!r}")
        if not isinstance(self.temperature, int | float) or not 0 < self.temperature < math.inf:
            raise BitfoldError(f"a temperature is above 0 and finite, not {self.temperature!r}")
        if not isinstance(self.weight, int | float) or not 0 <= self.weight < math.inf:
            raise BitfoldError(f"the weight of a distillation is 0 or more and finite, not {self.weight!r}")

    def of(self, said: Tensor, wanted: Tensor) -> Tensor:
        """The loss of one output, a mean over all but the last dimension (kl) or over everything (mse)."""
        if not said.dim():
            raise BitfoldError(
                "the model's first tensor of floats is a single number, a loss perhaps, which says nothing "
                "of its outputs; give the outputs of both models to bf.Distill().of, or return them first"
            )
        said, wanted = said.float(), wanted.float()
        if self.loss == "mse":
            return self.weight * F.mse_loss(said, wanted)
        rows = F.log_softmax(said / self.temperature, -1).reshape(-1, said.shape[-1])
        target = F.log_softmax(wanted / self.temperature, -1).reshape(-1, said.shape[-1])
        divergence = F.kl_div(rows, target, reduction="batchmean", log_target=True)
        return self.weight * self.temperature**2 * divergence


class Teacher:
    """A hook behind the model's forward, and the last loss."""

    def __init__(self, model: nn.Module, how: Distill) -> None:
        """`model`: of original modules."""
        # A model that is prepared anew has its float teacher already.
        earlier = teacher_of(model)
        floats = copy.deepcopy(model) if earlier is None else earlier.model
        self.model: nn.Module = floats.eval().requires_grad_(False)
        self.mark: str = mark_of(floats) if earlier is None else earlier.mark
        self.how = how
        self.loss: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "loss": None}  # a copy has heard nothing yet

    def __call__(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not model.training:
            return
        with torch.no_grad():
            self._follow(model)
            wanted = self.model(*args, **kwargs)
        self.loss = self.how.of(_logits(output), _logits(wanted))

    def _follow(self, model: nn.Module) -> None:
        """Be where the model was moved to, and in its dtype."""
        theirs = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, held in (*self.model.named_parameters(), *self.model.named_buffers()):
            like = theirs.get(name, held)
            if (like.device, like.dtype) != (held.device, held.dtype):
                held.data = held.data.to(like.device, like.dtype)


def mark_of(model: nn.Module) -> str:
    """What tells a teacher from another: a hash of the numbers in its state dict."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        numbers = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        found.update(f"{name} {numbers.dtype} {list(numbers.shape)}".encode())
        found.update(numbers.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def teacher_of(model: nn.Module) -> Teacher | None:
    """Who teaches the model."""
    found: tuple[Teacher, Any] | None = model.__dict__.get(TEACHER)
    return None if found is None else found[0]


def teach(model: nn.Module, teacher: Teacher) -> None:
    """Let the teacher listen to the model."""
    handle = model.register_forward_hook(teacher, with_kwargs=True)
    model.__dict__[TEACHER] = (teacher, handle)


def dismiss(model: nn.Module) -> int:
    """Let the teachers of a model, and of models in it, go; how many there were."""
    teaching = [module for module in model.modules() if TEACHER in module.__dict__]
    for module in teaching:
        _, handle = module.__dict__.pop(TEACHER)
        handle.remove()
    return len(teaching)


def distillation(model: nn.Module) -> Tensor:
    """The loss of the model's last call in training; what DistributedDataParallel made of it will do. Raises
    BitfoldError if there is none."""
    inside = module_of(model, "bf.distillation").modules()
    teacher = next((one.__dict__[TEACHER][0] for one in inside if TEACHER in one.__dict__), None)
    if teacher is None:
        raise BitfoldError("this model has no teacher; call bf.prepare_qat(model, .., distill=bf.Distill())")
    if teacher.loss is None:
        raise BitfoldError(
            "the model has not been called in training mode yet, so there is nothing to compare"
        )
    return teacher.loss  # type: ignore[no-any-return]


def _logits(output: Any) -> Tensor:
    """The output itself, its `logits`, or the first tensor of floats in it."""
    found = getattr(output, "logits", output)
    leaves = [
        leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    if not leaves:
        raise BitfoldError(f"a {type(output).__name__} holds no tensor of floats that could be compared")
    return leaves[0]
