"""Skinny kernels of several formats, launched once each for Nsight Compute to profile.

In: a GPU, rows of x. Out: the schedule of each on the terminal; the profile is the profiler's.

    ncu --profile-from-start off --clock-control none --section SpeedOfLight --section WarpStateStats \\
        --section Occupancy --section SchedulerStats -o m1 python benchmarks/ncu_skinny.py 1
    ncu --profile-from-start off --clock-control none --section SourceCounters -o s1 \\
        python benchmarks/ncu_skinny.py 1

`ncu_summary.py` reads what it wrote.
"""

from __future__ import annotations

import sys

import torch
from gemm_ours import Ours, chooser

FORMATS = ("int4[g128]", "mxfp4", "nvfp4", "int3[g128]", "int2[g128]", "int8")
N, K, WARMING = 28672, 4096, 3


def main() -> None:
    m = int(sys.argv[1])
    pick = chooser(None)
    for text in FORMATS:
        ours = Ours.of(text, N, K, pick)
        calls = ours.calls(torch.randn(m, K, device="cuda", dtype=torch.bfloat16))
        print(text, ours.schedule(m), flush=True)
        for call in calls[:WARMING]:
            call()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        calls[0]()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


if __name__ == "__main__":
    main()
