"""`bf.convert`: a trained, prepared model becomes a quantized one that gives the same numbers.

In: a model after `bf.prepare_qat` and any training, or a prepared program. Out: the same model with codes in
place of its weights, as `bf.quantize` would leave it; on the reference target its outputs are those that the
prepared model had in eval mode, bit for bit.

    PreparedLinear(weight, bias, weight_step)  ->  FoldedLinear(codes, scales, bias)

Each module's graph is made again, its quantizers take the trained scales, settle, and are folded: the same
passes as without training. Every check runs before the first write.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.fx import GraphModule

from ..formats import BitfoldError
from ..passes import Miss, Pipeline, SettleQuantizers
from ..passes.annotate import Annotate
from ..passes.note import annotated
from ..passes.observe import Observe
from .fold_sites import fold_sites
from .given_model import module_of
from .install import resolve_target
from .memory import held, release
from .module_scope import Call, Plan, Site, Step, site_of
from .prepare import train_pass
from .prepared import Preparation, Prepared, unprepare
from .tracing import TRACING


@torch.inference_mode(False)
def convert(model: nn.Module, *, target: str | None = None, progress: Step | None = None) -> Any:
    """Fold a prepared model, in place, or a prepared program. `target` and `progress`: as for `bf.quantize`.

    Returns the model, or the program. Raises BitfoldError, with the model as it was, if nothing is prepared,
    a parameter is sharded or not finite, or a range saw no data.
    """
    given, model = model, module_of(model, "bf.convert")
    with TRACING:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        on = resolve_target(target, device)
        if isinstance(model, GraphModule) and not any(isinstance(one, Prepared) for one in model.modules()):
            from .prepared_program import convert_program

            return convert_program(model, on, progress)
        prepared = {path: module for path, module in model.named_modules() if isinstance(module, Prepared)}
        if not prepared:
            raise BitfoldError(
                f"nothing in this {type(model).__name__} is prepared; call bf.prepare_qat first, or "
                "bf.quantize to quantize it without training"
            )
        _check(model)
        trained = _Trained(prepared)
        before = held(model)
        fold_sites(model, Plan(trained.sites, []), on, progress, trained.settle)
        trained.forget()
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


class _Trained:
    """Sites whose modules are original again, and what training had added to them."""

    def __init__(self, prepared: dict[str, Prepared]) -> None:
        self.extra: dict[str, dict[str, Tensor]] = {}
        self.about = {path: module.preparation for path, module in prepared.items()}
        self.sites: list[Site] = []
        kept = {
            path: (type(module), dict(module.__dict__), _held(module)) for path, module in prepared.items()
        }
        try:
            for path, module in prepared.items():
                self.extra[path] = unprepare(module)
            for path, module in prepared.items():
                site = _site(path, module, self.about[path])
                self.train(site)
                SettleQuantizers().check(site.gm)
                self.sites.append(_site(path, module, self.about[path]))
        except BaseException:
            for path, module in prepared.items():
                _restore(module, *kept[path])
            raise

    def train(self, site: Site) -> None:
        """The graph that trained, with the numbers that training arrived at."""
        if site.calibrated:
            Pipeline([Observe()]).run(site.gm)
        Pipeline([train_pass(self.about[site.path].options, resumed=True)]).run(site.gm)
        for name, tensor in self.extra[site.path].items():
            setattr(site.gm, name, tensor)

    def settle(self, site: Site) -> None:
        """What is done to a site just before it is folded."""
        self.train(site)
        Pipeline([SettleQuantizers()]).run(site.gm)

    def forget(self) -> None:
        self.extra.clear()


def _held(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return dict(module._parameters), dict(module._buffers), dict(module._modules)


def _restore(module: nn.Module, cls: type[nn.Module], attributes: dict[str, Any], held: Any) -> None:
    """A prepared module as it was."""
    module.__class__ = cls
    module.__dict__.clear()
    module.__dict__.update(attributes)
    for name, kept in zip(("_parameters", "_buffers", "_modules"), held, strict=True):
        module.__dict__[name] = kept


def _site(path: str, module: nn.Module, about: Preparation) -> Site:
    """The module's graph, annotated as it was when it was prepared."""
    call: Call | None = None
    if about.call is not None:
        device = next(parameter.device for parameter in module.parameters())
        call = tuple(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in about.call), {}
    # Rules speak of the path at which the module was prepared; an adapter may have moved it since.
    site = site_of(about.path, module, call)
    if isinstance(site, Miss):
        raise BitfoldError(f"layer {path}: {site.reason}")
    heads = about.path if about.tied_head else ""
    Pipeline([Annotate(recipe=about.recipe, heads=heads)]).run(site.gm)
    if not any(True for _ in annotated(site.gm)):
        raise BitfoldError(f"layer {path} no longer takes what it was prepared for; prepare the model again")
    site.path = path
    return site
