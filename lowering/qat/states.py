"""State dicts of prepared models: by their own names, and of this very preparation.

In: a prepared model, and a state dict, perhaps of a wrapper around such a model. Out: the state by the
model's names; or a sentence on why it is another one's, before anything is loaded.

    of_model(model, {"_orig_mod.0.weight": w})   ->   {"0.weight": w}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ...formats import BitfoldError
from .prepared import Prepared
from .trained_as import check_trained_as


def of_model(model: nn.Module, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state, without what torch.compile and DistributedDataParallel put before all of its names."""
    for prefix in ("_orig_mod.", "module."):
        own = any(name.startswith(prefix) for name in model.state_dict())
        if state and not own and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def check_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Raises BitfoldError if a state dict is not of this prepared model or program."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, Prepared):
            about = module.preparation
            check_trained_as(about.trains, state.get(f"{prefix}_extra_state"), path, about.teacher)
    here = model.state_dict()
    for name in (*here, *state):
        if name not in state or name not in here:
            where = "the model" if name in here else "the state"
            raise BitfoldError(
                f"only {where} has {name!r}: the state is of a model that was prepared by another recipe, "
                "other options or an earlier bitfold; give the same ones"
            )
        shapes = [getattr(held[name], "shape", None) for held in (here, state)]
        if shapes[0] != shapes[1] and not name.endswith("_extra_state"):  # which has been read above
            raise BitfoldError(
                f"{name} is {list(shapes[1] or ())} in the state and {list(shapes[0] or ())} here"
            )
