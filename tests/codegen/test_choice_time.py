"""What each call of a kernel pays to find its schedule: a look into a table by a spec that keeps its hash."""

from __future__ import annotations

import hashlib
import pickle
import sys
from types import FrameType

import pytest

from bitfold.codegen import GemmSpec, choose

TEXTS = [
    "linear 4096x4096 bf16 int4[g128,halves256]",
    "linear 14336x4096 bf16 2*int4[g128,halves256] -> mul(silu(y0),y1)",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_known_spec_is_looked_up_without_hashing_its_format_anew(text: str) -> None:
    """1.1 us where the hash is kept, 3.9 us where it is not. Calls are counted, not time."""
    spec = GemmSpec.parse(text)
    choose(spec, 1)
    calls: list[str] = []

    def count(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            calls.append(frame.f_code.co_qualname)

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        choose(spec, 1)
    finally:
        sys.setprofile(before)
    # An equal spec of an earlier test may be the table's key: it is compared, field by field, but not hashed.
    assert [name for name in calls if name.endswith(".__hash__")] == ["GemmSpec.__hash__"]
    assert not any("parse" in name or "walk" in name for name in calls)


def test_equal_specs_have_one_hash_in_every_process() -> None:
    """It travels with a pickled spec, and a table there must find it."""
    spec = GemmSpec.parse(TEXTS[0])
    assert hash(spec) == hash(GemmSpec.parse(TEXTS[0])) != hash(GemmSpec.parse(TEXTS[1]))
    assert choose(pickle.loads(pickle.dumps(spec)), 1) == choose(spec, 1)
    # Python's own hash of a text differs from process to process.
    assert spec.__hash__() == int.from_bytes(hashlib.sha256(TEXTS[0].encode()).digest()[:8], "little")
