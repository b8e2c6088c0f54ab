"""Where a token of a Llama-3-8B-shaped model goes: the profiler's kernels, by name and in order.

In: a variant of llama_decode.py. Out: text.

    PYTHONPATH=src python benchmarks/llama_profile.py --variant bitfold-int4 --layers 8 --batch 1
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import replace

import llama_decode
import torch
from llama import LLAMA_8B, build, inputs
from torch.profiler import ProfilerActivity, profile

STEPS, SHOWN = 8, 34


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", dest="one", default="bitfold-int4", type=llama_decode.variant)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    given = parser.parse_args()
    given.device, given.target = "cuda", None
    sizes = replace(LLAMA_8B, layers=given.layers)
    model, example = build(sizes, given.batch, "cuda"), inputs(sizes, given.batch, "cuda")
    ready, how = llama_decode.prepared(given, model, example)
    fast = torch.compile(ready, fullgraph=True, **how)
    with torch.inference_mode():
        for _ in range(5):
            fast(*example)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            for _ in range(STEPS):
                fast(*example).clone()
            torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    events = sorted(
        (e for e in found.events() if e.device_type == on_device), key=lambda e: e.time_range.start
    )
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        times[event.name].append(event.time_range.end - event.time_range.start)
    span = events[-1].time_range.end - events[0].time_range.start
    print(f"total per step us {sum(map(sum, times.values())) / STEPS} span {span / STEPS}")
    for name, each in sorted(times.items(), key=lambda item: -sum(item[1]))[:25]:
        mean = sum(each) / len(each)
        print(f"{sum(each) / STEPS:9.1f} us {len(each) / STEPS:6.1f}x {mean:7.2f} each  {name[:100]}")
    print("--- sequence")
    some = events[len(events) // 2 :][:SHOWN]
    for event in some:
        start, end = event.time_range.start, event.time_range.end
        print(f"{start - some[0].time_range.start:8.1f} {end - start:6.1f} {event.name[:90]}")


if __name__ == "__main__":
    main()
