"""Options of `torch.compile(model, backend="bitfold", options={...})`, checked before anything is captured.

In: the user's dictionary. Out: `Options`, or one sentence, which names the known keys near an unknown one.

    {"recipe": "int4", "mode": "max-autotune", "inductor": {"cpp.threads": 2}}
    ->  Options(recipe="int4", inductor={"max_autotune": True, ..., "cpp.threads": 2})
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import torch

from ..formats import BitfoldError, nearest
from ..passes import Pipeline, Trace
from ..passes.recipes import Recipe
from .lower import Lower
from .target import get_target

TraceSink = Callable[[Trace], Any] | list[Trace] | Path

DEFAULT_RECIPE = "int8"


@dataclass(frozen=True)
class Options:
    """recipe      a name ("int4"), a format, JSON or a `Recipe`; "int8" if there is neither it nor a pipeline
    target      a target's name, or several with commas, best first; by default that of the weights' device
    pipeline    the text of a pipeline that replaces the default one (and the recipe, which it names itself)
    trace       receives the `Trace` of each graph: a function, a list, or the path of a text file
    inference   fold also where gradients would be asked for; the graph then runs without them
    mode        as of torch.compile: "default", "reduce-overhead", "max-autotune", ...
    inductor    Inductor's own options, which win over those of the mode
    """

    recipe: str | Recipe | None = None
    target: str | None = None
    pipeline: str | None = None
    trace: TraceSink | None = None
    inference: bool = False
    mode: str | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.recipe is not None and self.pipeline is not None:
            raise BitfoldError(
                "options have both a recipe and a pipeline; give one of them (a pipeline names its recipe: "
                "annotate{recipe=...})"
            )
        if not isinstance(self.inference, bool):
            raise BitfoldError(f"the option inference is True or False, not {self.inference!r}")
        if self.pipeline is None:
            Recipe.parse(self.recipe or DEFAULT_RECIPE)
        for name in self.targets():
            get_target(name)
        _check_config(self.inductor)
        _mode_config(self.mode)

    @classmethod
    def parse(cls, given: Mapping[str, Any] | None) -> Options:
        """From the dictionary that `torch.compile` was given. Raises BitfoldError for what it cannot mean."""
        known = [option.name for option in fields(cls)]
        for key in given or {}:
            if key not in known:
                raise BitfoldError(
                    f"the bitfold backend has no option '{key}'{nearest(str(key), known)}; "
                    f"it has {', '.join(known)}"
                )
        values = dict(given or {})
        if "trace" in values:
            values["trace"] = _sink(values["trace"])
        return cls(**values)

    def targets(self) -> list[str]:
        """Names of the targets asked for, best first: by the option, or else by the pipeline's `lower`."""
        text = self.target
        if text is None and self.pipeline is not None:
            lower = [step for step in Pipeline.parse(self.pipeline).passes if isinstance(step, Lower)]
            text = lower[-1].target if lower else None
        return [name.strip() for name in text.split(",")] if text else []

    def config(self) -> dict[str, Any]:
        """What Inductor is to be configured with."""
        return {
            **_mode_config(self.mode),
            **{key.replace("-", "_"): self.inductor[key] for key in self.inductor},
        }


def _check_config(config: Mapping[str, Any]) -> None:
    if not isinstance(config, Mapping):
        raise BitfoldError(f"the option inductor is a dictionary of Inductor's options, not {config!r}")
    import torch._inductor.config

    known = torch._inductor.config.get_config_copy()
    for key in config:
        if key.replace("-", "_") not in known:
            raise BitfoldError(f"Inductor has no option '{key}'{nearest(key, known)}")


def _mode_config(mode: str | None) -> dict[str, Any]:
    if mode is None or mode == "default":
        return {}
    modes = torch._inductor.list_mode_options()
    if mode not in modes:
        raise BitfoldError(
            f"there is no mode '{mode}'{nearest(str(mode), modes)}; there are {', '.join(modes)}"
        )
    return dict(modes[mode])


def _sink(given: Any) -> TraceSink:
    if isinstance(given, str | os.PathLike):
        path = Path(given)
        if path.suffix == ".html":
            raise BitfoldError(
                f"the option trace writes text, not {path.name}; for a page give "
                f"trace=lambda trace: bitfold.viz(trace, {str(path)!r})"
            )
        if not path.parent.is_dir():
            raise BitfoldError(
                f"the option trace is {str(path)!r}, and there is no folder {str(path.parent)!r}"
            )
        return path
    if isinstance(given, list):
        return given
    if callable(given):
        return cast(Callable[[Trace], Any], given)
    raise BitfoldError(f"the option trace is a path, a list, or a function of a Trace, not {given!r}")


def deliver(sink: TraceSink | None, trace: Trace) -> None:
    """Give a trace to whoever asked for it; a file gets the traces of all graphs, one behind the other."""
    if isinstance(sink, list):
        sink.append(trace)
    elif isinstance(sink, Path):
        with sink.open("a", encoding="utf-8") as file:
            file.write(f"{trace}\n\n")
    elif sink is not None:
        sink(trace)
