"""What a user gives as a model: an `nn.Module` that can be worked on, or one sentence why not.

In: anything. Out: the module, taken out of what `torch.compile` wrapped around it.

    module_of(torch.compile(model), "bf.quantize")   ->  model
    module_of(torch.jit.script(model), "bf.save")    ->  BitfoldError
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from ..formats import BitfoldError
from .folded import Folded


def module_of(given: object, caller: str) -> nn.Module:
    """The module, by whose paths layers are named. Raises BitfoldError for what is none."""
    if isinstance(given, torch.jit.ScriptModule):
        raise BitfoldError(
            f"{caller} cannot look into a {type(given).__name__}; give the model that torch.jit was given"
        )
    if isinstance(given, nn.Module):
        # The one submodule of what torch.compile returns, whose class takes seconds to import.
        wrapped = given._modules.get("_orig_mod")
        return given if wrapped is None else module_of(wrapped, caller)
    instead = "; give the model that torch.export was given" if isinstance(given, ExportedProgram) else ""
    raise BitfoldError(f"{caller} takes a torch.nn.Module, not a {type(given).__name__}{instead}")


def is_graph(model: nn.Module) -> TypeGuard[GraphModule]:
    """Whether the layers are operators of a graph; false for a traced model whose modules are folded."""
    return isinstance(model, GraphModule) and not any(isinstance(one, Folded) for one in model.modules())
