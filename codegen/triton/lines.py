"""Source lines at a depth of indentation, and what Triton calls the types.

In: lines. Out: text.

    with out.indent("if a:"):
        out.add("b = 1")
"""

from __future__ import annotations

from dataclasses import dataclass, field

TL = {
    "bf16": "tl.bfloat16",
    "f16": "tl.float16",
    "f32": "tl.float32",
    "int8": "tl.int8",
    "e4m3": "tl.float8e4nv",
}
# How Triton writes the types of pointers.
POINTERS = {
    "bf16": "*bf16",
    "f16": "*fp16",
    "f32": "*fp32",
    "e8m0": "*u8",
    "e4m3": "*fp8e4nv",
    "int8": "*i8",
    "i16": "*i16",
    "u8": "*u8",
    "i32": "*i32",
}


@dataclass
class Lines:
    """Source lines at a depth of indentation."""

    text: list[str] = field(default_factory=list)
    depth: int = 0

    def add(self, *lines: str) -> None:
        self.text += ["    " * self.depth + line if line else "" for line in lines]

    def indent(self, line: str) -> Lines:
        self.add(line)
        self.depth += 1
        return self

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self.depth -= 1
