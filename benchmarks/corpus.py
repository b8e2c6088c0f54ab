"""The texts that the small language model is trained and judged on, as token ids in three splits.

In: the Brown corpus (npm), the King James Bible, and the documentation of Python, Linux, Perl and Git (Debian
packages, `PACKAGES` below). Out, in a folder: train.npy, validation.npy and test.npy, uint16 token ids in
which every document begins with <|bos|>; and beside the model the tokenizer (byte-level BPE, trained on the
training split alone) and the splits' hashes.

    python benchmarks/corpus.py --out out/lm        ->  out/lm/train.npy [14 M], validation.npy, test.npy

A document (a file of Brown, a chapter of the Bible, a page of documentation) is in one split as a whole;
which one is decided by its name's hash. Brown may be used for research and is not ours to hand on, so
neither texts nor tokens are in the repository; the Bible is in the public domain, the documentation under
its projects' licences. Debian updates packages within a release: other versions are other tokens, and
splits.json then says so.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bitfold.formats import BitfoldError
from bitfold.tools.text import detokenize, fetch_brown

MODEL = Path(__file__).parent / "lm"
VOCABULARY = 4096
BOS = "<|bos|>"
SPLITS = ("train", "validation", "test")
PACKAGES = ("bible-kjv", "bible-kjv-text", "python3.11-doc", "linux-doc-6.1", "perl-doc", "git-doc")


def main() -> int:
    arguments = _arguments()
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    texts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name, text in documents(out / "texts"):
        texts[split_of(name)].append(text)
    tokenizer = _tokenizer(texts["train"], arguments.retrain)
    hashes = {}
    for split, found in texts.items():
        ids = _encode(tokenizer, found)
        beside = out / f"{split}.part.npy"
        np.save(beside, ids)
        beside.replace(out / f"{split}.npy")
        hashes[split] = hashlib.sha256(ids.tobytes()).hexdigest()
        characters = sum(map(len, found))
        print(f"{split}: {len(found)} documents, {characters} characters, {len(ids)} tokens")
    return _compare(hashes, arguments.retrain)


def documents(folder: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of every document, in a fixed order; what is missing is fetched into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    yield from _brown(fetch_brown(folder))
    root = _debian(folder)
    yield from _bible(root)
    yield from _documentation(root)
    yield from _manuals(root)


def split_of(name: str) -> str:
    """90 % train, 5 % validation, 5 % test, by the name's hash."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 20
    return {0: "validation", 1: "test"}.get(place, "train")


def _brown(archive: Path) -> Iterator[tuple[str, str]]:
    with tarfile.open(archive) as tar:
        for name in sorted(name for name in tar.getnames() if len(name) == 12 and name[8] == "c"):
            file = tar.extractfile(name)
            assert file is not None
            lines = [line.split() for line in file.read().decode("ascii").splitlines()]
            sentences = [detokenize(word.rsplit("/", 1)[0] for word in words) for words in lines if words]
            yield f"brown/{name[8:]}", " ".join(sentences)


def _debian(folder: Path) -> Path:
    """The packages' files under `folder`/root, unpacked but not installed."""
    root = folder / "root"
    if not root.is_dir():
        if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
            raise BitfoldError(
                "the Bible and the documentation come as Debian packages; this wants apt-get and dpkg"
            )
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, check=True, capture_output=True)
        beside = folder / "root.part"
        for package in sorted(folder.glob("*.deb")):
            subprocess.run(["dpkg", "-x", str(package), str(beside)], check=True)
        beside.replace(root)
    return root


def _bible(root: Path) -> Iterator[tuple[str, str]]:
    """A document a chapter, a line a verse."""
    library = root / "usr/lib"
    command = [str(root / "usr/bin/bible"), "-p", str(library.resolve()), "-f", "-l100000", "gen1:1-rev22:21"]
    run = subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    chapters: dict[str, list[str]] = {}
    for line in run.stdout.splitlines():
        place, verse = line.split(" ", 1)
        chapters.setdefault(place.split(":")[0], []).append(verse)
    for chapter, verses in chapters.items():
        yield f"bible/{chapter}", "\n".join(verses)


def _documentation(root: Path) -> Iterator[tuple[str, str]]:
    """A document a page; the changelog, a list of a hundred thousand lines, is left out."""
    pages = root / "usr/share/doc/python3.11/html/_sources"
    for page in sorted(pages.rglob("*.rst.txt")):
        if page.name != "changelog.rst.txt":
            yield f"python/{page.relative_to(pages)}", page.read_text(encoding="utf-8")


def _manuals(root: Path) -> Iterator[tuple[str, str]]:
    """A document a page of what Linux, Perl and Git tell their users; translations are left out."""
    shared = root / "usr/share"
    linux = shared / "doc/linux-doc-6.1/Documentation"
    for page in sorted(linux.rglob("*.rst.gz")):
        name = page.relative_to(linux)
        if name.parts[0] != "translations":
            yield f"linux/{name}", gzip.decompress(page.read_bytes()).decode("utf-8", "replace")
    perl = next(iter(sorted((shared / "perl").iterdir()))) / "pod"
    for page in sorted(perl.glob("*.pod")):
        if not page.name.endswith("delta.pod"):  # of each release, what changed: lists like the changelog
            yield f"perl/{page.name}", page.read_text(encoding="utf-8", errors="replace")
    git = shared / "doc/git-doc"
    for page in sorted(git.rglob("*.txt")):
        if "RelNotes" not in page.parts:
            yield f"git/{page.relative_to(git)}", page.read_text(encoding="utf-8", errors="replace")


def _tokenizer(texts: list[str], retrain: bool):  # type: ignore[no-untyped-def]  # tokenizers has no types
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    path = MODEL / "tokenizer.json"
    if path.exists() and not retrain:
        return Tokenizer.from_file(str(path))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[BOS], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    path.parent.mkdir(exist_ok=True)
    tokenizer.save(str(path))
    return tokenizer


def _encode(tokenizer, texts: list[str]) -> np.ndarray:  # type: ignore[no-untyped-def, type-arg]
    bos = tokenizer.token_to_id(BOS)
    encoded = tokenizer.encode_batch(texts)
    return np.concatenate([np.array([bos, *one.ids], dtype=np.uint16) for one in encoded])


def _compare(hashes: dict[str, str], retrain: bool) -> int:
    """The splits are those that the committed model saw, or that is said."""
    path = MODEL / "splits.json"
    if retrain or not path.exists():
        path.write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")
        return 0
    known = json.loads(path.read_text(encoding="utf-8"))
    apart = [split for split in SPLITS if known[split] != hashes[split]]
    if apart:
        print(f"not the tokens that the committed model knows: {', '.join(apart)}", file=sys.stderr)
    return 1 if apart else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="out/lm")
    parser.add_argument(
        "--retrain", action="store_true", help="a new tokenizer and new hashes, for a new model"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
