"""`bf.convert`: a trained, prepared model becomes a quantized one that gives the same numbers.

In: a model after `bf.prepare_qat` and any training, or a prepared program. Out: the same model with codes in
place of its weights, as `bf.quantize` would leave it; on the reference target its outputs are those that the
prepared model had in eval mode, bit for bit.

    PreparedLinear(weight, bias, weight_step)  ->  FoldedLinear(codes, scales, bias)

Each module's graph is made again, its quantizers take the trained scales, settle, and are folded: the same
passes as without training. Every check runs before the first write. What stops the folding midway (Ctrl-C, or
memory that gives out) costs no training: layers that are not folded are prepared again, with all they had
learned, and another `bf.convert` ends the work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.fx import GraphModule

from ...formats import BitfoldError
from ...passes import Miss, Pipeline
from ...passes.annotate import Annotate
from ...passes.core import Progress
from ...passes.note import annotated
from ...passes.observing.observe import Observe
from ...passes.training.batch_norm import SettleBatchNorm
from ...passes.training.settle_quantizers import SettleQuantizers
from ..fold_sites import fold_sites, sources_of
from ..given_model import module_of
from ..install import resolve_target
from ..memory import held, release
from ..module_scope import Call, Plan, Site, site_of
from ..parameters import parameter_names
from ..tracing import TRACING
from .distill import dismiss
from .passes_of import train_pass
from .preparation import Preparation
from .prepared import Prepared, check_norms
from .prepared_program import convert_program
from .unprepared import Unprepared, unprepared
from .with_norm import identity, with_norm


@torch.inference_mode(False)
def convert(model: nn.Module, *, target: str | None = None, progress: Progress | None = None) -> Any:
    """Fold a prepared model, in place, or a prepared program. `target` and `progress`: as for `bf.quantize`.

    Returns the model, or the program. Raises BitfoldError, with the model as it was, if nothing is prepared,
    a parameter is sharded or not finite, or a range saw no data. If it is stopped later, layers that are
    folded stay so, the others are prepared as before, and it can be called again.
    """
    given, model = model, module_of(model, "bf.convert")
    with TRACING:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        on = resolve_target(target, device)
        if isinstance(model, GraphModule) and not any(isinstance(one, Prepared) for one in model.modules()):
            return convert_program(model, on, progress)
        if not any(isinstance(one, Prepared) for one in model.modules()):
            if dismiss(model):  # what stopped an earlier call came after the last layer
                return given
            raise BitfoldError(
                f"nothing in this {type(model).__name__} is prepared; call bf.prepare_qat first, or "
                "bf.quantize to quantize it without training"
            )
        _check(model)
        check_norms(model)
        trained = {
            path: _Trained(path, one, one.preparation, next(iter(one.folded_norm), None))
            for path, one in model.named_modules()
            if isinstance(one, Prepared) and not one.preparation.freezes
        }
        with unprepared(model) as back:
            again = _Again(parameter_names(model))
            sites = [one.site(back.extra[path], again) for path, one in trained.items()]
            # A batch norm is nothing once the convolution computes it, and not before.
            sites.sort(key=lambda site: trained[site.path].about.folded_away)
            done = _Done(back, ((path, one.module) for path, one in trained.items()))
            before = held(model)
            fold_sites(
                model,
                Plan(sites, []),
                on,
                progress,
                before=lambda site: trained[site.path].settle(site),
                after=done.add,
                again="call bf.convert again",
            )
            dismiss(model)
        release(before - held(model))
        return given


def _check(model: nn.Module) -> None:
    for path, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise BitfoldError(
                f"{path} is sharded over several processes; gather the model before bf.convert"
            )
        if parameter.is_meta:
            raise BitfoldError(f"{path} is on the meta device and has no numbers; load the model first")


class _Done:
    """Modules that are folded. One whose parameters another has too is kept until that one is, so that tied
    weights have one set of codes though the work is interrupted between them."""

    def __init__(self, back: Unprepared, modules: Iterable[tuple[str, nn.Module]]) -> None:
        self.back = back
        self.reads = {path: {id(p) for p in module.parameters()} for path, module in modules}
        self.waiting = Counter(key for keys in self.reads.values() for key in keys)
        self.kept: set[str] = set()

    def add(self, path: str) -> None:
        self.waiting.subtract(self.reads[path])
        self.kept.add(path)
        for one in [one for one in self.kept if not any(self.waiting[key] for key in self.reads[one])]:
            self.kept.remove(one)
            self.back.forget(one)


@dataclass(frozen=True)
class _Again:
    """What making the graphs of a model's modules again goes by: the names of parameters, and the graph of
    each kind of module, which is captured once."""

    names: Mapping[int, list[str]]
    captured: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Trained:
    """A module that trained: where it is, how it was prepared, and the batch norm that it computes."""

    path: str
    module: nn.Module
    about: Preparation
    norm: nn.Module | None

    def site(self, extra: Mapping[str, Tensor], again: _Again) -> Site:
        """The graph that trained, with the numbers that training arrived at, ready to be folded; `extra`:
        what training had added to the module, which is original again. Raises BitfoldError for what cannot be
        folded."""
        if self.about.folded_away:
            return Site(self.path, self.module, identity(self.path))
        site = _site(self.path, self.module, self.about, again.captured)
        for name, parameter in self.module.named_parameters(recurse=False):
            if parameter.numel() and not all(bool(end.isfinite()) for end in torch.aminmax(parameter)):
                raise BitfoldError(f"{self.path}.{name} has NaN or infinity in it; training diverged")
        for name, tensor in extra.items():
            if tensor.is_floating_point() and tensor.dtype != torch.float32:
                raise BitfoldError(
                    f"{self.path}.{name} is {tensor.dtype}, and learned scales and ranges are float32 "
                    "whatever the model is; load the state that has them so"
                )
        site.sources = sources_of(site, again.names)  # roundings hide them
        if site.calibrated:
            Pipeline([Observe()]).run(site.gm, record=False)
        Pipeline([train_pass(self.about.options, loaded=True)]).run(site.gm, record=False)
        if self.norm is not None:
            with_norm(site.gm, self.norm, self.about.options, loaded=True)
        for name, tensor in extra.items():
            setattr(site.gm, name, tensor)
        SettleBatchNorm().check(site.gm)
        SettleQuantizers().check(site.gm)
        return site

    def settle(self, site: Site) -> None:
        """What is done to a site just before it is folded."""
        if self.about.folded_away:
            return
        Pipeline([SettleBatchNorm(), SettleQuantizers()]).run(site.gm, record=False)
        if self.norm is not None and self.module._parameters["bias"] is not None:
            # The map of the batch norm is in the bias now.
            self.module._parameters["bias"] = site.gm.get_parameter("bias")


def _site(path: str, module: nn.Module, about: Preparation, captured: dict[Any, Any]) -> Site:
    """The module's graph, annotated as it was when it was prepared."""
    call: Call | None = None
    if about.call is not None:
        device = next(parameter.device for parameter in module.parameters())
        call = tuple(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in about.call), {}
    # Rules speak of the path at which the module was prepared; an adapter may have moved it since.
    site = site_of(about.path, module, call, cache=captured)
    if isinstance(site, Miss):
        raise BitfoldError(f"layer {path}: {site.reason}")
    heads = about.path if about.tied_head else ""
    Pipeline([Annotate(recipe=about.recipe, heads=heads)]).run(site.gm, record=False)
    if not any(True for _ in annotated(site.gm)):
        raise BitfoldError(f"layer {path} no longer takes what it was prepared for; prepare the model again")
    site.path = path
    return site
