"""A person's own file, imported so that the formats, passes and targets that it registers are known.

In: the path of a Python file. Out: the imported module; importing the same file again returns the same one.

    bitfold quantize --plugin my_format.py --recipe "my_format[g32]" -o model.safetensors
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from ..formats import BitfoldError


def import_file(path: str | Path) -> ModuleType:
    """Raises BitfoldError if there is no such file, or with the file's own error in one sentence."""
    place = Path(path).resolve()
    if not place.is_file() or place.suffix != ".py":
        raise BitfoldError(f"there is no Python file {str(path)!r} to import")
    name = f"bitfold_plugin_{place.stem}_{abs(hash(str(place))):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise BitfoldError(f"importing {path} failed: {type(error).__name__}: {error}") from error
    return module
