"""The write: the planned modules folded in place, one by one, each float weight freed before the next.

In: a plan whose checks have passed. Out: the model's modules on codes. If memory gives out midway, the
modules that are done run on codes, the others as before, and the error says which and how to go on.

    Site("up", nn.Linear(weight), graph)  ->  the same object, a FoldedLinear(codes, scales)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from ..formats import BitfoldError, Quantized
from ..passes import Pipeline, expression, state
from ..passes.anchors import TARGETS
from ..passes.core import Progress, below
from ..passes.fold import DEQUANTIZE, Fold
from ..passes.note import annotated
from ..passes.stages import find_attribute
from .files.graph_data import dump, tensor_names
from .install import Installer, Source, Sources
from .module_scope import Plan, Site
from .parameters import parameter_names
from .report import ATTRIBUTE
from .steps_back import back_from
from .turned import turned


class _Tied:
    """Codes of tied weights, made once. Keeps nothing of a weight that only one module has."""

    def __init__(self, tied: set[int]) -> None:
        self._tied = tied
        self._codes: dict[tuple[int, str, str], Quantized] = {}

    def folded(self, parameter: Tensor, expression: str, format: str, make: Any) -> Quantized:
        if id(parameter) not in self._tied:
            return make(parameter)  # type: ignore[no-any-return]
        key = (id(parameter), expression, format)
        if key not in self._codes:
            self._codes[key] = make(parameter)
        return self._codes[key]


def fold_sites(
    model: nn.Module,
    found: Plan,
    target: str,
    progress: Progress | None = None,
    *,
    before: Callable[[Site], None] | None = None,
    after: Callable[[str], None] | None = None,
    again: str = "call bf.quantize with the same arguments again",
) -> None:
    """Fold every site of the plan. Raises BitfoldError, naming what is done, if that fails midway.

    `before`: what is done to a site's graph just before, such as putting trained scales into it; `after`: is
    told the path of a site that is done; `again`: what goes on after a failure.
    """
    names = parameter_names(model)
    store = _Tied({key for key, paths in names.items() if len(paths) > 1})
    installer = Installer(target)
    done: list[str] = []
    sites, total = found.sites, len(found.sites)
    known = (*getattr(model, ATTRIBUTE, ()), *found.misses)
    model.__dict__[ATTRIBUTE] = known
    while sites:
        site = sites.pop(0)
        if progress is not None:
            progress(f"fold {site.path}", len(done), total)
        try:
            _fold_site(site, names, store, installer, before)
        except (MemoryError, RuntimeError, OSError) as error:
            raise BitfoldError(_midway(site, done, total, error, again)) from error
        done.append(site.path)
        if after is not None:
            after(site.path)
        model.__dict__[ATTRIBUTE] = (*known, *installer.misses)
    if progress is not None:
        progress("folded", total, total)


def _fold_site(
    site: Site,
    names: Mapping[int, list[str]],
    store: _Tied,
    installer: Installer,
    before: Callable[[Site], None] | None,
) -> None:
    wanted, dtype = sources_of(site, names) if site.sources is None else site.sources
    state(site.gm).store = store
    if before is not None:
        before(site)
    Pipeline([Fold()]).run(site.gm, record=False)
    graph = dump(site.gm)
    sources = {_codes_of(anchor): source for anchor, source in wanted.items()}
    tensors = {name: find_attribute(site.gm, name) for name in tensor_names(graph)}
    installer.install(site.path, site.module, graph, tensors, sources, dtype, ranks=site.ranks, gm=site.gm)


def sources_of(site: Site, names: Mapping[int, list[str]]) -> Sources:
    """What is about to become codes in a site, by the anchor that reads it, and the dtype it computes in.

    One parameter may be read in several ways, each of which has codes of its own.
    """
    sources: dict[Node, Source] = {}
    dtype = torch.float32
    for node, note in annotated(site.gm):
        operand = node.args[TARGETS[node.target][2]]
        chain = expression(site.gm, operand)  # type: ignore[arg-type]
        if chain is None:
            continue
        dtype = chain.parameter.dtype
        if note.weight:
            own = below(chain.path, site.path)
            path = names[id(chain.parameter)][0]
            shape, back = tuple(chain.parameter.shape), back_from(chain, note.anchor)
            if site.columns is not None and back is not None:
                back = (("columns", site.columns), *back)
            if turned(node) and back is not None:
                back = (("hadamard", ()), *back)
            sources[node] = Source(own, shape, path, back, (path, chain.text, back))
    return sources, dtype


def _codes_of(anchor: Node) -> str:
    """The attribute that holds the codes of an anchor's weight, after folding."""
    node = anchor.args[TARGETS[anchor.target][2]]
    while isinstance(node, Node) and node.target is not DEQUANTIZE:
        node = node.args[0]  # the views from the rows that were folded to what the anchor takes
    assert isinstance(node, Node), f"the weight of {anchor.name} was not folded"
    return str(node.args[0][0].target)  # type: ignore[index, union-attr]


def _midway(site: Site, done: list[str], total: int, error: BaseException, again: str) -> str:
    cause = error.__cause__ or error
    why = ": ".join(part for part in (type(cause).__name__, str(cause).strip().split("\n")[0]) if part)
    so_far = f"{', '.join(done[:3])}{', ...' if len(done) > 3 else ''}" if done else "none"
    return (
        f"folding {site.path} failed ({why}) with {len(done)} of {total} modules folded ({so_far}); those "
        f"run on codes, the others as before: remove the cause and {again}, which goes on from there"
    )
