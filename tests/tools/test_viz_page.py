"""The page in a real browser: it opens from disk, says what the trace says, follows mouse, keys and address.

loop of blocks -> capture -> annotate, fold, fuse -> page.html -> headless Chromium
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bitfold.passes.annotate import Annotate
from bitfold.passes.pipeline import Pipeline
from bitfold.passes.recipes import Recipe
from bitfold.passes.rules import Rule
from bitfold.passes.scopes.program import capture
from bitfold.passes.trace import Change, GraphSnapshot, NodeSnapshot, Step, Trace
from bitfold.tools.viz import node_errors, viz

OPEN_ALL_MS = """(() => {
  const start = performance.now();
  Main.show({ open: new Set(Main.graph().groups.keys()) });
  return performance.now() - start;
})()"""

TEXTS_OUTSIDE_THEIR_BOX = """[...document.querySelectorAll('#world .node, #world .closed')].filter((box) => {
  const right = box.querySelector('.frame').getBBox().width;
  const end = (text) => text.getBBox().x + text.getBBox().width;
  return [...box.querySelectorAll(':scope > text')].some((text) => end(text) > right);
}).map((box) => box.dataset.key)"""

# Relative luminance and contrast as WCAG 2 defines them.
CONTRAST = """(text, ground) => {
  const channels = (name) => {
    const probe = document.body.appendChild(document.createElement('div'));
    probe.style.color = `var(--${name})`;
    const found = getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map(Number);
    probe.remove();
    return found;
  };
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = (name) => channels(name).map((v) => linear(v / 255))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const [high, low] = [light(text), light(ground)].sort((x, y) => y - x);
  return (high + 0.05) / (low + 0.05);
}"""

DEFAULTS = {
    "op": "call_function", "target": "aten.relu.default", "args": "", "inputs": (), "users": (),
    "shape": (2, 8), "dtype": "f32", "bytes": 64, "module_path": "", "source": "", "text": "", "format": "",
    "note": "", "made_from": (),
}  # fmt: skip


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.up = nn.Linear(64, 128)
        self.odd = nn.Linear(128, 128)
        self.down = nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.odd(torch.sigmoid(self.up(self.norm(x))))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(6)])
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


RECIPE = Recipe(
    "mixed",
    (
        Rule("layers.*", weight="int8", input="int8"),
        Rule("*.odd", weight="int4[g48]", on_misfit="report"),  # 48 does not divide 128: six misses
    ),
)


@pytest.fixture(scope="module")
def trace_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    inputs = (torch.randn(4, 64),)
    model = Net().eval()
    reference, gm = capture(model, inputs), capture(model, inputs)
    trace = Pipeline((Annotate(recipe=RECIPE), *Pipeline.parse("fold,fuse").passes)).run(gm)
    errors = node_errors(reference, gm, inputs)
    return viz(trace, tmp_path_factory.mktemp("viz") / "trace.html", errors=errors, title="six blocks")


def steps_page(path: Path, nodes: list[NodeSnapshot]) -> Path:
    """A page of one stage with these nodes; who reads what is filled in."""
    users: dict[str, list[str]] = {node.name: [] for node in nodes}
    for node in nodes:
        for name in node.inputs:
            users[name].append(node.name)
    full = tuple(NodeSnapshot(**{**vars(node), "users": tuple(users[node.name])}) for node in nodes)
    return viz(Trace([Step("captured", "", "captured", GraphSnapshot(full), 0, 0.0, (), Change())]), path)


def snap(name: str, **given: object) -> NodeSnapshot:
    return NodeSnapshot(name=name, **{**DEFAULTS, **given})  # type: ignore[arg-type]


def state(page, expression: str):
    return page.evaluate(f"(() => {{ const s = Main.state; return {expression}; }})()")


def boxes(page) -> set[str]:
    return set(page.evaluate("[...document.querySelectorAll('#world [data-key]')].map((b) => b.dataset.key)"))


def test_it_opens_on_the_last_stage_with_layers_closed(browser, trace_page) -> None:
    page = browser.open(trace_page)
    assert page.text("#title") == "six blocks" and page.text("#where") == "after fuse"
    assert boxes(page) >= {f"@layers.{i}" for i in range(6)} | {"x", "output"}
    assert not any(key.startswith("layers_") for key in boxes(page)), "what is in a layer is not drawn yet"
    stages = page.evaluate("[...document.querySelectorAll('#stages b')].map((b) => b.textContent)")
    assert stages == ["0  captured", "1  annotate", "2  fold", "3  fuse"]
    legend = page.text("#legend")
    assert all(word in legend for word in ("quantized weight", "fused region", "missed", "untouched"))
    assert "6 missed" in page.text("#totals")
    assert page.complaints() == []


def test_a_click_opens_a_layer_and_shows_a_node_with_source_format_bytes_and_error(
    browser, trace_page
) -> None:
    page = browser.open(trace_page)
    page.click('[data-key="@layers.2"]')
    assert "@layers.2.up" in boxes(page) and state(page, "s.selected") == "@layers.2"
    assert "What fuse did here" in page.text("#panel")
    page.evaluate("Main.select('fused_layers_2_up', {center: true})")
    page.click('[data-key="fused_layers_2_up"]')
    panel = page.text("#panel")
    for fact in (
        "fused region", "layers.2.up", "test_viz_page.py:", "torch.sigmoid(self.up(self.norm(x)))",
        "int8", "[4, 128]", "f32", "signal to noise", "dB", "Inside the region", "aten.sigmoid", "made from",
        "33.3 kB → 9216 B",  # (128*64 + 128) * 4 bytes -> 128*64 of codes + (128 + 128) * 4 of scales, biases
    ):  # fmt: skip
        assert fact in panel, fact
    page.click('[data-key="@layers.2"] .bar', at=(30, 10))
    assert "@layers.2.up" not in boxes(page), "a second click closes it"
    assert page.complaints() == []


def test_what_a_pass_changed_is_marked_and_before_shows_what_it_removed(browser, trace_page) -> None:
    page = browser.open(trace_page, hash="step=2&node=linear_3")
    assert page.text("#where") == "after fold"
    classes = page.evaluate("document.querySelector('[data-key=linear_3]').getAttribute('class')")
    assert "changed" in classes and "kind-compute" in classes
    assert page.evaluate("document.querySelectorAll('.node.added.kind-weight').length") >= 2
    assert "Through the stages" in page.text("#panel") and "1 annotate" in page.text(".history")
    page.click("#before")
    assert page.text("#where") == "before fold"
    removed = page.evaluate("[...document.querySelectorAll('.node.removed')].map((b) => b.dataset.key)")
    assert removed == ["layers_1_up_weight"]
    page.click("#tab-changes")
    assert "layers.0" in page.text("#panel") and "bitfold.dequantize" in page.text(".diff")
    first = page.evaluate("document.querySelector('.diff').textContent")
    assert "- linear" in first and "+ linear" in first
    cause = page.text(".cause")
    assert "test_viz_page.py:" in cause and "rule linear layers.*: weight int8, input int8" in cause
    page.click("#tab-code")
    assert page.evaluate("document.querySelectorAll('.diff .row').length") > 100
    assert page.complaints() == []


def test_misses_are_listed_with_their_reasons_and_lead_to_their_node(browser, trace_page) -> None:
    page = browser.open(trace_page)
    assert page.text("#tab-misses") == "Missed 6"
    page.click("#tab-misses")
    assert page.evaluate("document.querySelectorAll('.misses > li').length") == 6
    assert "48" in page.text(".misses") and "128" in page.text(".misses")
    page.click(".misses .jump")
    assert "Missed:" in page.text("#panel") and state(page, "s.tab") == "node"
    assert "missed" in page.evaluate("document.querySelector('#world .selected').getAttribute('class')")


def test_search_finds_by_words_and_reveals_what_it_finds(browser, trace_page) -> None:
    page = browser.open(trace_page)
    page.key("/")
    page.type("layers.4 sigmoid")
    found = page.evaluate(
        "[...document.querySelectorAll('#found [role=option]')].map((li) => li.dataset.jump)"
    )
    assert found == [] and "nothing in this stage" in page.text("#found"), "fuse took it into a region"
    page.evaluate("document.getElementById('search').select()")
    page.type("layers.4 fused")
    page.wait_for("document.querySelectorAll('#found [role=option]').length >= 1")
    page.key("Enter")
    chosen = state(page, "s.selected")
    assert chosen.startswith("fused_layers_4") and chosen in boxes(page)
    assert page.evaluate("document.activeElement.dataset.key") == chosen
    assert page.complaints() == []


def test_keys_alone_are_enough(browser, trace_page) -> None:
    page = browser.open(trace_page)
    page.key("[")
    assert state(page, "s.step") == 2
    page.key("]")
    page.key("]")
    assert state(page, "s.step") == 3, "the last stage stays the last"
    page.evaluate("Main.select('@layers.1'); Main.focusKey('@layers.1')")
    page.key("ArrowDown")
    assert state(page, "s.selected") == "@layers.2"
    page.key("Enter")
    assert "@layers.2.up" in boxes(page)
    page.key("ArrowDown")
    assert state(page, "s.selected") not in ("@layers.2", "@layers.3"), "into the open layer"
    page.key("b")
    assert page.text("#where") == "before fuse"
    page.key("e")
    assert "@layers.5.down" in boxes(page)
    page.key("c")
    assert "@layers.5.down" not in boxes(page)
    page.key("?")
    assert page.evaluate("document.getElementById('help').open")
    page.key("Escape")
    page.evaluate("document.getElementById('tab-node').focus()")
    page.key("ArrowRight")
    assert state(page, "s.tab") == "changes"
    unnamed = "(e) => !e.textContent.trim() && !e.getAttribute('aria-label')"
    controls = "[...document.querySelectorAll('button, input, [role=button]')]"
    assert page.evaluate(f"{controls}.filter({unnamed}).length") == 0
    assert page.complaints() == []


def test_dragging_pans_and_is_no_click(browser, trace_page) -> None:
    page = browser.open(trace_page)
    before = page.evaluate("({...Main.camera})")
    left, top, wide, high = page.box('[data-key="@layers.1"]')
    page.drag((left + wide / 2, top + high / 2), (40, 25))
    after = page.evaluate("({...Main.camera})")
    assert (after["x"] - before["x"], after["y"] - before["y"]) == pytest.approx((40, 25), abs=0.5)
    assert state(page, "s.selected") is None and "@layers.1.up" not in boxes(page)


@pytest.mark.parametrize(("width", "height"), [(1280, 720), (1920, 1080)])
def test_everything_fits_the_window_in_light_and_dark(browser, trace_page, width, height) -> None:
    page = browser.open(trace_page, width=width, height=height, hash="theme=dark&node=linear_3&step=2")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    whole = "document.documentElement"
    assert page.evaluate(f"[{whole}.scrollWidth, {whole}.scrollHeight]") == [width, height]
    assert page.evaluate(TEXTS_OUTSIDE_THEIR_BOX) == []
    page.key("t")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != ground
    assert "theme=light" in page.evaluate("location.hash")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_contrast(browser, trace_page, theme) -> None:
    """WCAG AA: 4.5:1 for text on the grounds it stands on."""
    page = browser.open(trace_page, hash=f"theme={theme}")
    pairs = [
        (t, g) for t in ("text", "quiet", "accent") for g in ("ground", "panel", "box", "group", "hover")
    ]
    pairs += [("text", "added-bg"), ("text", "removed-bg"), ("text", "changed-bg"), ("ground", "missed")]
    low = {
        f"{t} on {g}": r
        for t, g in pairs
        if (r := page.evaluate(f"({CONTRAST})({json.dumps(t)}, {json.dumps(g)})")) < 4.5
    }
    assert low == {}


def test_a_graph_of_one_node(browser, tmp_path) -> None:
    page = browser.open(steps_page(tmp_path / "one.html", [snap("x", op="placeholder", target="x")]))
    assert boxes(page) == {"x"}
    page.click('[data-key="x"]')
    assert "input or output" in page.text("#panel")
    assert page.complaints() == []


def test_hostile_names_are_text(browser, tmp_path) -> None:
    evil = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 2'>"
    nodes = [
        snap("x", op="placeholder", target="x"),
        snap(
            "<script>", target=evil, inputs=("x",), module_path=f"a.{evil}", source=evil, text=evil, note=evil
        ),
        snap("y'\"]", target="a", inputs=("<script>",), module_path=f"a.{evil}"),
    ]
    page = browser.open(steps_page(tmp_path / "evil.html", nodes), hash="node=%3Cscript%3E")
    assert evil in page.text("#panel")
    page.evaluate("Main.select('y\\'\"]', {center: true})")
    page.key("/")
    page.type("script")
    assert page.evaluate("window.broken") is None
    assert page.complaints() == []


SIZES = [(30, 50, True), (100, 50, False)]


def layered(layers: int, each: int, *, flat: bool = False) -> list[NodeSnapshot]:
    """A chain with skips: `layers` modules of `each` operations, and a value that all of them read."""
    nodes = [
        snap("x", op="placeholder", target="x"),
        snap("mask", inputs=("x",), module_path="" if flat else "model"),
    ]
    last = "x"
    for layer in range(layers):
        start = last
        for i in range(each):
            part = ("norm", "attention.q", "attention", "mlp.up", "mlp")[5 * i // each]
            inputs = (last, "mask") if part == "attention" else (last, start) if i == each - 1 else (last,)
            last = f"op_{layer}_{i}"
            path = "" if flat else f"model.layers.{layer}.{part}"
            nodes.append(snap(last, target="aten.mul.Tensor", inputs=inputs, module_path=path))
    return [*nodes, snap("output", op="output", target="output", inputs=(last,))]


@pytest.mark.parametrize(("layers", "each", "flat"), SIZES)
def test_large_graphs_open_at_once_and_stay_responsive(browser, tmp_path, layers, each, flat) -> None:
    """1,500 nodes without any module, and 5,000 in modules. Opens in 3 s, moves at ten frames a second with
    every box open, the best of three tries each: other tests share the two cores. (Idle ones take 0.4 s and
    28 ms.)"""
    path = steps_page(tmp_path / "large.html", layered(layers, each, flat=flat))
    times = []
    for _ in range(3):
        page = browser.open(path)
        times.append(page.evaluate("performance.now()"))
        if times[-1] < 3000:
            break
    assert min(times) < 3000, times
    assert len(boxes(page)) < 150
    opened = page.evaluate(OPEN_ALL_MS)
    assert len(boxes(page)) >= layers * each
    assert opened < 8000 * layers * each / 1500
    frames = [page.frame_ms() for _ in range(3)]
    assert min(frames) < 100, frames
    page.evaluate("Main.fit()")
    frames = [page.frame_ms() for _ in range(3)]
    assert min(frames) < 100, frames
    page.evaluate("Main.select('op_7_3', {center: true})")
    left, top, _, _ = page.box(".selected")
    assert 236 <= left <= 1000 and 40 <= top <= 720, "what is chosen comes into view"
    assert page.complaints() == []
