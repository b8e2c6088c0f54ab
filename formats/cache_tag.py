"""What torch's compile caches must know of the formats.

In: the sources of this folder, and every registered format. Out: a tag in the key of torch's compile caches.

AOTAutograd's on-disk cache knows an operator by its name and arguments, not by what it computes. After an
upgrade of this package, or with another table registered under the same name, it would serve yesterday's
kernel and yesterday's numbers. `torch.compiler.config.cache_key_tag` is part of every key, so the tag goes
there.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch


def add(text: str) -> None:
    """Adds a digest of `text` to the keys of torch's compile caches, behind whatever tag is there."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    tag = torch.compiler.config.cache_key_tag
    if digest not in tag:
        torch.compiler.config.cache_key_tag = f"{tag} bitfold:{digest}".strip()


def sources() -> str:
    """The code of this folder and those in it: what the operators compute."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return "\n".join(file.read_text(encoding="utf-8") for file in files)
