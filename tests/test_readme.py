"""The README is run: each of its Python blocks, in order, on a small model with the names that it uses."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(128, 256), nn.Linear(256, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down_proj(torch.relu(self.up_proj(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_it_has_blocks() -> None:
    assert len(BLOCKS) >= 6


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_block_runs(index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = Model().eval()
    names = {
        "torch": torch,
        "model": model,
        "skeleton": copy.deepcopy(model).to("meta"),
        "x": torch.randn(2, 128),
        "w": torch.randn(64, 128),
    }
    before = model(names["x"])
    exec(compile(BLOCKS[index], f"README block {index}", "exec"), names)
    # Whatever a block did to the model, it still computes nearly the same.
    error = (model(names["x"]) - before).norm() / before.norm()
    assert error < 0.2
    assert all("</html>" in page.read_text(encoding="utf-8") for page in tmp_path.glob("*.html"))
