"""Paths that no file can have: one sentence each, and nothing written."""

import os
import re
from pathlib import Path

import pytest
from torch import nn

import bitfold as bf

PATHS: dict[str, tuple[object, str]] = {
    "through a file": ("file.txt/x", "file.txt/x cannot be written: file.txt is a file"),
    "this folder": (".", "'.' names no file"),
    "nothing": ("", "names no file"),
    "a folder": ("folder/", "folder cannot be written: it is a folder"),
    "too long a name": ("n" * 300, r"n{77}\.\.\. cannot be written: File name too long$"),
    "None": (None, "a file's path is text or a pathlib.Path, not a NoneType"),
    "a number": (3, "a file's path is text or a pathlib.Path, not an? int"),
    "a zero byte": ("a\0b", r"'a\\x00b' is no path: it has a zero byte"),
    "no such folder": ("no/m.safetensors", "no/m.safetensors cannot be written: there is no folder no; make"),
    "a device": ("/dev/null", "/dev/null cannot be written: it is a device"),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize("case", PATHS)
def test_no_place_for_a_file(case: str, folder: Path) -> None:
    path, message = PATHS[case]
    model = bf.quantize(nn.Sequential(nn.Linear(32, 32)), "int8", target="reference")
    with pytest.raises(bf.BitfoldError, match=message) as said:
        bf.save(model, path)
    assert "\n" not in str(said.value) and len(str(said.value)) < 200
    assert sorted(p.name for p in folder.rglob("*")) == ["file.txt", "folder"]
    assert (folder / "file.txt").read_text() == "mine"


@pytest.mark.parametrize("case", PATHS)
def test_no_file_to_read(case: str, folder: Path) -> None:
    with pytest.raises(
        bf.BitfoldError, match=r"is not a file|there is no file|cannot be read|is no path|a file's path"
    ):
        bf.load(PATHS[case][0], into=nn.Linear(2, 2))


def test_paths_that_are_fine(folder: Path) -> None:
    model = bf.quantize(nn.Sequential(nn.Linear(32, 32)), "int8", target="reference")
    longest = "n" * os.pathconf(folder, "PC_NAME_MAX")
    for path in (longest, b"bytes.safetensors", Path("folder") / "m", "../" + folder.name + "/up"):
        bf.save(model, path)
        assert Path(os.fsdecode(path)).is_file()
        bf.load(path, into=nn.Sequential(nn.Linear(32, 32)))
    assert not [p for p in folder.rglob("*") if re.search(r"\.part$", p.name)]
