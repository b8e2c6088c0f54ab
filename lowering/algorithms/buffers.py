"""What a model writes into its own buffers while it runs (counters, caches, running statistics), put back.

In: a model. Out: its buffers as they were, before each of its runs and after the last one.

    kept = Buffers(model)
    model(x); kept.back(); model(x)        both runs start from the same state

So every run of a measurement is one of the same model, and the model is afterwards as it was. Codes, which
nothing writes to, are not copied.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..folded import Folded


class Buffers:
    """The buffers of a model, and a copy of what is in them now."""

    def __init__(self, model: nn.Module) -> None:
        self._held: list[tuple[nn.Module, str, Tensor, Tensor, int]] = [
            (module, name, buffer, buffer.clone(), written(buffer))
            for module in model.modules()
            if not isinstance(module, Folded)
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def __len__(self) -> int:
        return len(self._held)

    def back(self) -> None:
        """Put back what has been written to since."""
        for place, (module, name, buffer, value, version) in enumerate(self._held):
            module._buffers[name] = buffer
            if version == written(buffer) >= 0:
                continue
            buffer.copy_(value)
            self._held[place] = module, name, buffer, value, written(buffer)


def written(tensor: Tensor) -> int:
    """Goes up with every write; -1 where that is not counted."""
    return -1 if tensor.is_inference() else tensor._version
