"""`bf.convert`: a trained, prepared model becomes a quantized one that gives the same numbers.

In: a model after `bf.prepare_qat` and any training, or a prepared program. Out: the same model with codes in
place of its weights, as `bf.quantize` would leave it; on the reference target its outputs are those that the
prepared model had in eval mode, bit for bit.

    PreparedLinear(weight, bias, weight_step)  ->  FoldedLinear(codes, scales, bias)

Each module's graph is made again, its quantizers take the trained scales, settle, and are folded: the same
passes as without training. Every check runs before the first write.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
from ..fold_sites import fold_sites
from ..given_model import module_of
from ..install import resolve_target
from ..memory import held, release
from ..module_scope import Call, Plan, Site, site_of
from ..tracing import TRACING
from .distill import dismiss
from .norms import identity, with_norm
from .prepare import train_pass
from .prepared import Preparation, Prepared, check_norms, unprepared


@torch.inference_mode(False)
def convert(model: nn.Module, *, target: str | None = None, progress: Progress | None = None) -> Any:
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
        check_norms(model)
        about = {path: module.preparation for path, module in prepared.items()}
        norms = {path: module.folded_norm[0] for path, module in prepared.items() if module.folded_norm}
        with unprepared(model) as extra:
            trained = _Trained(about, extra, norms)
            sites = [trained.checked(path, module) for path, module in prepared.items()]
        dismiss(model)
        before = held(model)
        fold_sites(model, Plan(sites, []), on, progress, trained.settle)
        extra.clear()
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


@dataclass(frozen=True)
class _Trained:
    """What training had added to modules that are original again, by path, and how they were prepared."""

    about: Mapping[str, Preparation]
    extra: Mapping[str, dict[str, Tensor]]
    norms: Mapping[str, nn.Module]

    def checked(self, path: str, module: nn.Module) -> Site:
        """The site to fold. Raises BitfoldError for what cannot be folded."""
        if self.about[path].folded_away:
            return Site(path, module, identity(path))
        site = _site(path, module, self.about[path])
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.numel() and not all(bool(end.isfinite()) for end in torch.aminmax(parameter)):
                raise BitfoldError(f"{path}.{name} has NaN or infinity in it; training diverged")
        for name, tensor in self.extra[path].items():
            if tensor.is_floating_point() and tensor.dtype != torch.float32:
                raise BitfoldError(
                    f"{path}.{name} is {tensor.dtype}, and learned scales and ranges are float32 whatever "
                    "the model is; load the state that has them so"
                )
        self.train(site)
        SettleBatchNorm().check(site.gm)
        SettleQuantizers().check(site.gm)
        return _site(path, module, self.about[path])

    def train(self, site: Site) -> None:
        """The graph that trained, with the numbers that training arrived at."""
        if site.calibrated:
            Pipeline([Observe()]).run(site.gm, record=False)
        how = self.about[site.path].options
        Pipeline([train_pass(how, loaded=True)]).run(site.gm, record=False)
        norm = self.norms.get(site.path)
        if norm is not None:
            with_norm(site.gm, norm, how, loaded=True)
        for name, tensor in self.extra[site.path].items():
            setattr(site.gm, name, tensor)

    def settle(self, site: Site) -> None:
        """What is done to a site just before it is folded."""
        if self.about[site.path].folded_away:
            return
        self.train(site)
        Pipeline([SettleBatchNorm(), SettleQuantizers()]).run(site.gm, record=False)
        if site.path in self.norms and site.module._parameters["bias"] is not None:
            # The map of the batch norm is in the bias now.
            site.module._parameters["bias"] = site.gm.get_parameter("bias")


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
    Pipeline([Annotate(recipe=about.recipe, heads=heads)]).run(site.gm, record=False)
    if not any(True for _ in annotated(site.gm)):
        raise BitfoldError(f"layer {path} no longer takes what it was prepared for; prepare the model again")
    site.path = path
    return site
