"""Machine instructions of GPU kernels' loops for each weight, counted in what the compiler makes.

In: formats (with a layout, or in the library's) and schedules. Out: of each a line, and its commonest
instructions. No GPU is needed, but Triton with its disassembler.

    python benchmarks/gpu_instructions.py > benchmarks/results/gpu-instructions.txt
    python benchmarks/gpu_instructions.py "int3[g128]: m8 n64 w2 s3 k1 sum o1"

    int3[g128,units256] m8 n64 w2 s3 k1 sum o1: 1.98 a weight and thread, 0.89 at half rate; 96 registers, ..

Half rate: logic, shifts, integer additions and the like, 64 lanes a clock and multiprocessor (compute
capability 9.0).
"""

from __future__ import annotations

import collections
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from bitfold.codegen import GemmSpec, Schedule, kernel_layout
from bitfold.codegen.triton.inspect import inspect
from bitfold.formats import format

N, K = 28672, 4096
M1, M16 = "m8 n64 w2 s3 k1 sum o1", "m16 n64 w2 s3 k1 sum o1"
HALF_RATE = {"LOP3", "SHF", "IADD3", "PRMT", "SEL", "ISETP", "LEA", "VIADD", "VIMNMX", "PLOP3"}
WANTED = [
    f"{text}: {schedule}"
    for schedule in (M1, M16)
    for text in (
        "int4[g128]", "int2[g128]", "int2[g128,halves512]", "int3[g128,halves256]", "int3[g128]",
        "int3[g128,units512]", "int5[g128]", "int6[g128]", "mxfp4[halves128]", "mxfp4",
        "mxfp6_e3m2[halves256]", "mxfp6_e3m2", "nvfp4[halves64]", "nvfp4",
    )
]  # fmt: skip
WANTED += [
    f"{text}: {schedule} {joined}"
    for schedule in (M1, M16)
    for text, joined in (("mxfp4", "j2"), ("nvfp4", "j2"), ("nvfp4", "j4"))
]
WANTED += [f"nvfp4: {m} n64 w2 s3 k1 lane o1 {joined}" for m in ("m8", "m16") for joined in ("j2", "j4")]


def loop(listing: str) -> list[str]:
    """The instructions of the longest loop."""
    labels: dict[str, int] = {}
    found: list[str] = []
    for line in listing.splitlines():
        label = re.match(r"(\.L_\w+):", line.strip())
        instruction = re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line)
        if label is not None:
            labels[label[1]] = len(found)
        elif instruction is not None:
            found.append(instruction[1])
    longest = 0, 0
    for at, text in enumerate(found):
        jump = re.search(r"BRA.*?`\((\.L_\w+)\)", text)
        start = labels.get(jump[1], at + 1) if jump is not None else at + 1
        if at - start > longest[1] - longest[0]:
            longest = start, at
    return found[longest[0] : longest[1] + 1]


def operation(text: str) -> str:
    """`@!P0 LOP3.LUT R1, ..`   ->   LOP3"""
    words = text.split()
    return words[words[0].startswith("@")].split(".")[0]


def disassembled(cubin: bytes) -> str:
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def counted(text: str, schedule: Schedule) -> str:
    fmt = format(text)
    laid_out = fmt if "halves" in text or "units" in text else kernel_layout(fmt, K)
    if laid_out is None:
        raise SystemExit(f"no kernel walks over {text} with rows of {K}; leave it out")
    spec = GemmSpec(laid_out, N, K)
    made = inspect(spec, schedule)
    body = loop(disassembled(made.cubin))
    kinds = collections.Counter(map(operation, body))
    weights = schedule.block_n * schedule.walk(spec).codes / (32 * schedule.warps)
    half = sum(count for kind, count in kinds.items() if kind in HALF_RATE)
    most = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common(10))
    return (
        f"{spec.weight} {schedule}: {len(body) / weights:.2f} a weight and thread, {half / weights:.2f} at "
        f"half rate; {made.registers} registers, {made.spills} bytes spilled\n    {most}"
    )


def main() -> None:
    for one in sys.argv[1:] or WANTED:
        text, _, schedule = one.partition(": ")
        print(counted(text, Schedule.parse(schedule)), flush=True)


if __name__ == "__main__":
    main()
