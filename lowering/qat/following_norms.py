"""Which batch norm follows which convolution in a model of modules.

In: a model and its planned sites. Out: for each convolution that a batch norm alone reads, that batch norm;
and why the others stay alone.

    forward(x): relu(self.bn1(self.conv1(x)))   ->   {"layer1.conv1": Norm("layer1.bn1", layer1.bn1)}

Who reads what is seen in the forward of the module that calls both, traced by torch.fx in both modes with
every module in it as one operator; no example data is needed. Where that forward cannot be traced (it looks
at numbers), batch norm stays a module of floats, and the report says so.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Node, Proxy, Tracer
from torch.utils import _pytree as pytree

from ...formats import BitfoldError
from ...passes import MissRecord
from ...passes.scopes.module import is_stock
from ..module_scope import Site

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Norm:
    """A batch norm, and where it is in the model."""

    path: str
    module: nn.Module


class _Children(Tracer):
    """One forward, every module that it calls a single operator."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def following_norms(model: nn.Module, sites: Sequence[Site]) -> tuple[dict[str, Norm], list[MissRecord]]:
    """The batch norm that folds into each site, by the site's path; and those that do not, and why."""
    paths = {module: path for path, module in model.named_modules()}
    stock = (site for site in sites if type(site.module) in CONVOLUTIONS and is_stock(site.module))
    wanted = {site.module: site for site in stock}
    norms = {module: path for path, module in model.named_modules() if type(module) in NORMS}
    if not wanted or not norms:
        return {}, []
    pairs, calls, untraced = _calls(model, paths)
    shared = Counter(id(p) for module in paths for p in module._parameters.values() if p is not None)
    found: dict[str, Norm] = {}
    misses: list[MissRecord] = []
    for norm, path in norms.items():
        before = pairs.get(norm)
        if before is None:
            reason = "no convolution stands alone before it, in both modes, in the forward that calls it"
            reason = next((why for owner, why in untraced if norm in owner.modules()), reason)
        elif before not in wanted:
            continue  # the recipe leaves that convolution as it is
        else:
            reason = _obstacle(before, norm, calls, shared)
        if not reason:
            assert before is not None
            found[wanted[before].path] = Norm(path, norm)
        else:
            misses.append(MissRecord(path, path, "", "fold_norm", reason))
    return found, misses


def _calls(
    model: nn.Module, paths: Mapping[nn.Module, str]
) -> tuple[dict[nn.Module, nn.Module], Counter[nn.Module], list[tuple[nn.Module, str]]]:
    """Which convolution each batch norm alone reads, how often each module is called, and what cannot be
    traced, the innermost first."""
    pairs: dict[nn.Module, nn.Module] = {}
    calls: Counter[nn.Module] = Counter()
    untraced: list[tuple[nn.Module, str]] = []
    for owner in reversed(list(paths)):
        if not any(type(inner) in NORMS for inner in owner.modules()) or type(owner) in NORMS:
            continue
        if type(owner).forward is nn.Module.forward and "forward" not in owner.__dict__:
            continue  # a list of modules
        try:
            if "forward" in owner.__dict__:
                raise BitfoldError("it is set on the instance")  # and torch.fx reads that of the class
            modes = [_called(owner, training) for training in (True, False)]
        except Exception as error:  # whatever the user's forward does with a stand-in for its input
            why = str(error).strip().split("\n")[0]
            untraced.append((owner, f"the forward of {paths[owner] or 'the model'} cannot be traced ({why})"))
            continue
        for module in dict.fromkeys(module for called in modes for module in called):
            times = [called.get(module, []) for called in modes]
            calls[module] += max(len(befores) for befores in times)
            before = next(befores[0] for befores in times if befores)
            # Where one mode leaves the batch norm out, it must leave the convolution out too.
            alike = all(
                befores[0] is before if befores else before not in called
                for befores, called in zip(times, modes, strict=True)
            )
            if type(module) in NORMS and before is not None and alike:
                pairs[module] = before
    return pairs, calls, untraced


def _called(owner: nn.Module, training: bool) -> dict[nn.Module, list[nn.Module | None]]:
    """What each module that the forward calls in this mode reads alone in each of its calls."""
    twin = _stand_in(owner, training)
    graph = _Children().trace(twin)
    # What the forward keeps in an attribute has a reader that the graph does not show.
    leaves = pytree.tree_leaves(list(twin.__dict__.values()))
    kept = {leaf.node for leaf in leaves if isinstance(leaf, Proxy)}
    found: dict[nn.Module, list[nn.Module | None]] = {}
    for node in graph.find_nodes(op="call_module"):
        before = None if node.args and node.args[0] in kept else _read_alone(node)
        found.setdefault(owner.get_submodule(str(node.target)), []).append(
            None if before is None else owner.get_submodule(before)
        )
    return found


def _stand_in(owner: nn.Module, training: bool) -> nn.Module:
    """The module, for a forward that may write to its buffers, its attributes, and lists among them."""
    twin = owner.__class__.__new__(owner.__class__)
    kept = {
        name: copy.copy(value) if isinstance(value, (dict, list, set)) else value
        for name, value in owner.__dict__.items()
    }
    twin.__dict__.update(kept, training=training)
    twin.__dict__["_buffers"] = {
        name: None if one is None else one.clone() for name, one in owner._buffers.items()
    }
    return twin


def _read_alone(node: Node) -> str | None:
    """The module whose result this call alone reads."""
    source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
    if not isinstance(source, Node) or source.op != "call_module" or set(source.users) != {node}:
        return None
    return str(source.target)


def _obstacle(before: nn.Module, norm: Any, calls: Mapping[nn.Module, int], shared: Mapping[int, int]) -> str:
    """Why a batch norm is not folded, or ''."""
    if calls[before] != 1 or calls[norm] != 1:
        return "it, or the convolution before it, is called more than once"
    if "forward" in norm.__dict__:
        return "its forward is set on the instance"
    if norm.running_mean is None or norm.momentum is None:
        return "it has no running statistics that move by a fixed share"
    if any(shared[id(p)] > 1 for p in (before._parameters["weight"], *norm._parameters.values())):
        return "its numbers, or the weight before it, belong to other modules too"
    hooked = (before._forward_hooks, norm._forward_pre_hooks, norm._forward_hooks)
    if any(hooked):
        return "hooks see what stands between it and the convolution"
    return ""
