"""`bf.load`: a saved model into a skeleton, or a saved program alone, for any target.

In: a file of `bf.save`, and for a model a skeleton of the same architecture (on `meta` if you like: only what
is in the file is made). Out: the skeleton, quantized in place as `load_module` says, its tensors mapped from
the file; or a GraphModule.

    with torch.device("meta"): skeleton = LlamaForCausalLM(config)
    model = bf.load("model.safetensors", into=skeleton)
    program = bf.load("program.safetensors", target="reference")

Everything is checked before the skeleton is touched.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...formats import BitfoldError
from ..folded_weight import Canonical
from ..given_model import module_of
from ..install import CANONICAL, canonical_parts, lower_graph, resolve_target
from ..program import as_program
from ..tracing import TRACING
from .graph_data import load as load_graph
from .graph_data import tensor_names
from .load_module import ModulePlan, check_parts
from .paths import FileError
from .tensor_file import TensorFile, open_file


@torch.inference_mode(False)
def load(
    path: str | os.PathLike[str],
    into: nn.Module | None = None,
    *,
    target: str | None = None,
    device: str | torch.device | None = None,
) -> Any:
    """Load what `bf.save` wrote.

    into    the skeleton of a saved model: its architecture, with or without weights; not for a program
    target  where it shall run; by default that of the device
    device  where the tensors go; by default where the skeleton's are, or the CPU for a skeleton on meta

    Unquantized tensors, and what quantized layers compute in, take the skeleton's dtype, as in torch's
    `load_state_dict`; where the skeleton is on meta, the file's. Codes and scales always keep the file's.

    Returns `into`, or the program as a GraphModule. Raises BitfoldError (a sentence that names the tensor or
    the module) for a file that is damaged, newer than this bitfold, or of another architecture.
    """
    with TRACING:
        return _load(open_file(path), into, target, device)


def _load(
    file: TensorFile, into: nn.Module | None, target: str | None, device: str | torch.device | None
) -> Any:
    place = None if device is None else torch.device(device)
    if file.header["kind"] not in ("program", "module"):
        raise FileError(
            f"{file.path} has a damaged bitfold header (kind {file.header['kind']!r}); save the model again"
        )
    if file.header["kind"] == "program":
        if into is not None:
            raise BitfoldError(
                f"{file.path} holds a program, which needs no skeleton; call bf.load(path) alone"
            )
        return _load_program(file, place or torch.device("cpu"), target)
    if into is None:
        raise BitfoldError(
            f"{file.path} holds the weights of a {file.header.get('model', 'model')}; give its skeleton: "
            "bf.load(path, into=model)"
        )
    with _reading_header(file):
        plan = ModulePlan(file, module_of(into, "bf.load(path, into=...)"), place)
        plan.check()
    plan.write(resolve_target(target, plan.device))
    return into


@contextmanager
def _reading_header(file: TensorFile) -> Iterator[None]:
    """What goes wrong in here is the header's fault, since nothing else has been touched yet: it is data
    that somebody else may have written, so that any error at all may come of it.
    """
    try:
        yield
    except (BitfoldError, OSError, MemoryError):
        raise
    except Exception as error:
        raise FileError(
            f"{file.path} has a damaged bitfold header ({type(error).__name__}: {error}); save the model "
            "again"
        ) from error


def _load_program(file: TensorFile, device: torch.device, target: str | None) -> Any:
    on = resolve_target(target, device)
    made: dict[str, Tensor] = {}
    with _reading_header(file):
        graph, tied = file.header["graph"], file.header["tied"]
        parameters = set(file.header["parameters"])
        names = {name: tied.get(name, name) for name in tensor_names(graph)}
        for name, first in names.items():
            if first not in file:
                raise FileError(f"{file.path} lacks the tensor {name!r} that its program uses; save it again")
        check_parts(file, canonical_parts(graph), lambda name: tied.get(name, name))
    for first in dict.fromkeys(names.values()):
        tensor = file[first].to(device)
        made[first] = nn.Parameter(tensor, requires_grad=False) if first in parameters else tensor
    with _reading_header(file):
        gm = load_graph(graph, {name: made[first] for name, first in names.items()}, device)
    gm.meta[CANONICAL] = Canonical(graph, {})
    return as_program(lower_graph(gm, on))
