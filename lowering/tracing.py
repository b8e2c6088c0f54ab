"""One trace at a time in a process.

In: what traces or builds graphs (`bf.quantize`, `bf.load`). Out: its turn.

    with TRACING: plan(model, recipe, ...)

`torch.fx` and `torch.export` patch `nn.Module` for the whole process while they trace, so that a module that
another thread calls meanwhile would be recorded too. The backend of `torch.compile` stays out of it: Dynamo
holds a lock of its own around that, and whoever holds this one may ask for Dynamo's.
"""

from __future__ import annotations

import threading

TRACING = threading.RLock()
