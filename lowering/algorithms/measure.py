"""Statistics of what goes into the linears of sites, gathered while batches run.

In: sites (modules and their annotated graphs) and a way to run all batches. Out: `Inputs` on the anchors.

    measure([q_proj, k_proj, v_proj], run)     one look at the tensor that all three read

With `Pairs`, `run` calls each batch twice, in the float model first: what was seen there is kept until the
same call comes on rounded weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from ...formats import BitfoldError
from ...passes.algorithms.inputs import INPUTS, Inputs
from ...passes.anchors import TARGETS
from ...passes.note import Note, annotated
from ...passes.scopes.module import is_stock
from ..module_scope import Site
from ..turned import turned
from .at_rest import in_order


class Pairs:
    """What goes into anchors in the float model, kept until it comes on rounded weights."""

    def __init__(self) -> None:
        self.kept: dict[Node, list[Tensor]] = {}
        self.exact = False

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """While this runs, what is seen is the float model's."""
        self.exact = True
        self.kept.clear()
        try:
            yield
        finally:
            self.exact = False

    def add(self, path: str, node: Node, x: Tensor) -> None:
        """Keep it, or note it together with the one that was kept."""
        if self.exact:
            self.kept.setdefault(node, []).append(x.detach().clone())
            return
        kept = self.kept.get(node)
        exact = kept.pop(0) if kept else x
        # A router may send a layer other tokens than in the float model: those say nothing of one another.
        alike = exact.shape == x.shape and float((exact - x).norm()) <= float(exact.norm())
        _add(path, node, x, exact if alike else x)


def measure(
    group: Sequence[Site], run: Callable[[], None], *, repeated: bool = False, pairs: Pairs | None = None
) -> None:
    """Run, and leave statistics on the anchors of these sites, which all read one tensor.

    `run` calls a batch after the other through `once`, which ends each as soon as the tensor was seen; if it
    is `repeated`, several are to be seen in one batch, and each runs to its end.
    """
    group = [site for site in group if linears(site.gm)]
    if not group:
        return
    alone = [site for site in group if not _simple(site)]
    together = [site for site in group if _simple(site)]
    handles = [
        site.module.register_forward_pre_hook(gatherer(site, pairs), with_kwargs=True)
        for site in (*alone, *together[:1])
    ]
    if not alone and not repeated:
        handles.append(together[0].module.register_forward_pre_hook(_stop_early))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    for site in together[1:]:
        seen = linears(together[0].gm)[0][0].meta.get(INPUTS)
        if seen is not None:
            linears(site.gm)[0][0].meta[INPUTS] = seen


class _StopEarly(Exception):
    """What was to be measured has been: the rest of the block need not run."""


def _stop_early(module: nn.Module, args: Any) -> None:
    raise _StopEarly


def once(call: Callable[[], object]) -> None:
    """`call`, as far as `measure` needs it."""
    with contextlib.suppress(_StopEarly):
        call()


def linears(gm: GraphModule) -> list[tuple[Node, Note]]:
    """The anchors whose weight takes a format and whose input has a second moment worth knowing."""
    return [(node, note) for node, note in annotated(gm) if note.anchor == "linear" and note.weight]


def gatherer(site: Site, pairs: Pairs | None = None) -> Callable[..., None]:
    """A hook that notes what goes into the linears of a site's graph."""
    nodes = [node for node, _ in linears(site.gm)]
    simple, add = _simple(site), _add if pairs is None else pairs.add

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = in_order(module, args, kwargs)
        if simple:
            add(site.path, nodes[0], given[0])
        elif nodes:
            Gatherer(site.gm, nodes, site.path, add, module).run(*given)

    return hook


class Gatherer(Interpreter):
    """Runs a graph and looks at what these anchors are given; with the parameters of `module`, the one that
    was captured, as they are now (balanced, say), if that is given."""

    def __init__(
        self,
        gm: GraphModule,
        nodes: Sequence[Node],
        path: str,
        add: Callable[[str, Node, Tensor], None] | None = None,
        module: nn.Module | None = None,
    ) -> None:
        super().__init__(gm)
        self.nodes, self.path, self.add = frozenset(nodes), path, add or _add
        self.now = {} if module is None else dict(module.named_parameters(remove_duplicate=False))

    def fetch_attr(self, target: str) -> Any:
        return self.now[target] if target in self.now else super().fetch_attr(target)

    def run_node(self, n: Node) -> Any:
        if n in self.nodes:
            source = n.args[TARGETS[n.target][1]]
            assert isinstance(source, Node)
            self.add(self.path, n, self.env[source])
        return super().run_node(n)


def _simple(site: Site) -> bool:
    """A stock linear: its argument is what the anchor is given."""
    found = linears(site.gm)
    return is_stock(site.module) and len(found) == 1 and not turned(found[0][0])


def _add(path: str, node: Node, x: Tensor, exact: Tensor | None = None) -> None:
    if INPUTS not in node.meta:
        node.meta[INPUTS] = Inputs(x.shape[-1], x.device)
    try:
        node.meta[INPUTS].add(x, exact)
    except BitfoldError as error:
        raise BitfoldError(f"layer {path}: {error}; look at the calibration data") from error
