"""bitfold as a quantizer of transformers: quantized while loading, saved and loaded again as any model.

In: a recipe. Out: a configuration that `from_pretrained` takes. Whatever imports this module has registered
bitfold with transformers, also for a folder that was saved so.

    from bitfold import BitfoldConfig
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=BitfoldConfig("int4[g64]"))
    model.save_pretrained("small"); AutoModelForCausalLM.from_pretrained("small")

The folder's safetensors files are those of `bf.save`, header included, in as many pieces as transformers
makes. Loading one, transformers loads what is not quantized; the layers that are get their codes afterwards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...formats import BitfoldError
from ...passes.recipes import Recipe
from ..files.load_module import ModulePlan
from ..files.paths import FileError
from ..files.save import contents_of, join
from ..files.skeleton import submodule_in
from ..files.tensor_file import KEY, open_file
from ..folded import Folded
from ..install import resolve_target
from ..quantize import quantize

try:
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise BitfoldError(
        "BitfoldConfig is for models of transformers 5: run `pip install 'bitfold[hf]'`"
    ) from error

METHOD = "bitfold"
_CHECKPOINT = "bitfold_checkpoint_files"


@register_quantization_config(METHOD)
class BitfoldConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers has no types
    """What `from_pretrained(quantization_config=...)` takes.

    recipe  a name, a format, JSON text or a `Recipe`, as `bf.quantize` takes it; one without calibration
    target  where it shall run once quantized; by default that of the device, as for a folder saved so
    """

    def __init__(self, recipe: str | Recipe = "int8", *, target: str | None = None, **unknown: Any) -> None:
        if unknown.pop("quant_method", METHOD) != METHOD or unknown:
            raise BitfoldError(
                f"a BitfoldConfig has recipe and target, not {', '.join(unknown) or 'another quant_method'}"
            )
        self.quant_method = METHOD
        self.recipe = str(Recipe.parse(recipe))
        self.target = target

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method, "recipe": self.recipe}

    def attach(self, model: nn.Module) -> None:
        """Make `model`, which `bf.quantize` or `bf.load` has folded, one that `save_pretrained` writes."""
        if not any(isinstance(module, Folded) for module in model.modules()):
            raise BitfoldError(f"nothing in this {type(model).__name__} is quantized; call bf.quantize first")
        if not hasattr(model, "save_pretrained"):
            raise BitfoldError(f"a {type(model).__name__} is no model of transformers; save it with bf.save")
        quantizer = BitfoldQuantizer(self, pre_quantized=True)
        model.hf_quantizer = quantizer
        model.config.quantization_config = self  # type: ignore[union-attr]


@register_quantizer(METHOD)
class BitfoldQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers has no types
    """What transformers calls while it loads and saves a model."""

    requires_calibration = False
    quantization_config: BitfoldConfig
    loaded_dtype: torch.dtype | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        given = kwargs.get("device_map")
        places = set(given.values()) if isinstance(given, Mapping) else {given}
        if len(places) > 1 or "disk" in places:
            raise BitfoldError(
                f"a model is quantized on one device, and device_map has {sorted(map(str, places))}; give one"
            )

    def preprocess_model(self, model: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        self.loaded_dtype = dtype
        super().preprocess_model(model, dtype=dtype, **kwargs)

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if not self.pre_quantized:
            return
        files = list(kwargs.get("checkpoint_files") or ())
        if not files:
            raise BitfoldError("a model that is quantized already is loaded from files; there are none here")
        file = open_file(*files)
        gone = {
            join(path, weight["name"])
            for path, entry in file.header["modules"].items()
            for weight in entry["weights"]
        }
        for name in gone:
            owner, _, last = name.rpartition(".")
            module = submodule_in(model, owner)
            if module is None or last not in module._parameters:
                raise FileError(
                    f"{file.path} has codes for {name!r}, which this {type(model).__name__} lacks"
                )
            module._parameters[last] = None
            # transformers would draw random numbers for what it does not find in the files.
            module.__dict__["_is_hf_initialized"] = True
        ties: Any = getattr(model, "all_tied_weights_keys", {})
        model.__dict__["all_tied_weights_keys"] = {k: v for k, v in ties.items() if not {k, v} & gone}
        # What the model has no place for yet, codes and buffers that are computed, is read afterwards.
        later = set(file.header["tensors"]) - set(model.state_dict())
        known: Any = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        patterns = {*known, *(f"^{re.escape(name)}$" for name in later)}
        model.__dict__["_keys_to_ignore_on_load_unexpected"] = patterns
        model.__dict__[_CHECKPOINT] = files

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        target = self.quantization_config.target
        if not self.pre_quantized:
            quantize(model, self.quantization_config.recipe, target=target)
            return model
        files = model.__dict__.pop(_CHECKPOINT)
        plan = ModulePlan(open_file(*files), model, None)
        plan.check()
        plan.write(resolve_target(target, plan.device))
        for module in model.modules():
            if isinstance(module, Folded) and self.loaded_dtype is not None:
                module.compute_in(self.loaded_dtype)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors and the header of `bf.save`."""
        contents, header = contents_of(model)
        made = {name: t if isinstance(t, Tensor) else t() for name, t in contents.tensors.items()}
        return {name: tensor.detach() for name, tensor in made.items()}, {KEY: json.dumps(header)}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True
