"""A headless Chromium for the tests of pages: the devtools protocol over a pipe, no other library.

page = browser.open(path, width=1280, height=720)
page.evaluate("document.title"); page.click("#fit"); page.key("]"); page.screenshot(out)
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # what several of these tests use stands beside them

_FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars "
    "--remote-debugging-pipe"
)
_PAN_FRAME_MS = """new Promise((done) => {
  const start = performance.now();
  let left = 20;
  const step = () => {
    Main.camera.y -= 9;
    Main.move();
    if (left-- > 0) requestAnimationFrame(step);
    else done((performance.now() - start) / 20);
  };
  requestAnimationFrame(step);
})"""
_WAIT = 60.0  # seconds for one answer: two cores are shared with the other tests


class Browser:
    """One Chromium process; every page is a tab of it."""

    def __init__(self, program: str, profile: Path) -> None:
        # Chromium reads commands from descriptor 3 and answers on 4. The ends that go there must not be 3 or
        # 4 themselves, hence the copies above 10.
        read_end, self._write = os.pipe()
        self._read, write_end = os.pipe()
        to_child, from_child = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (read_end, write_end))
        os.close(read_end)
        os.close(write_end)
        quiet = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
        self._pid = os.posix_spawn(
            program,
            [program, *_FLAGS.split(), f"--user-data-dir={profile}", "about:blank"],
            os.environ,
            file_actions=[*quiet, (os.POSIX_SPAWN_DUP2, to_child, 3), (os.POSIX_SPAWN_DUP2, from_child, 4)],
            setsid=True,
        )
        os.close(to_child)
        os.close(from_child)
        self._buffer = b""
        self._count = 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send one command and wait for its answer; what happens meanwhile is kept in `events`."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next(method)
            if answer.get("id") != self._count:
                self.events.append(answer)
            elif "error" in answer:
                raise RuntimeError(f"{method}: {answer['error']['message']}")
            else:
                return answer["result"]

    def _next(self, method: str) -> dict[str, Any]:
        end = time.monotonic() + _WAIT
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            data = os.read(self._read, 1 << 20) if ready else b""
            if not data:
                raise RuntimeError(f"chromium gave no answer to {method}")
            self._buffer += data
        text, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(text)

    def open(self, path: Path, *, width: int = 1280, height: int = 720, hash: str = "") -> Page:
        """A new tab with the page, once its script says that it is ready."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, target)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.resize(width, height)
        page.call("Page.navigate", url=path.resolve().as_uri() + (f"#{hash}" if hash else ""))
        page.wait_for("document.body && document.body.dataset.ready === 'yes'")
        return page

    def close(self) -> None:
        """End the process and those that it started (a session of their own)."""
        os.close(self._write)
        os.close(self._read)
        for _ in range(100):
            if os.waitpid(self._pid, os.WNOHANG)[0]:
                return
            time.sleep(0.05)
        os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)


class Page:
    """One tab."""

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self._browser, self._session, self._target = browser, session, target

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']['exception'].get('description')}")
        return answer["result"].get("value")

    def wait_for(self, condition: str) -> None:
        end = time.monotonic() + _WAIT
        while not self.evaluate(condition):
            assert time.monotonic() < end, f"never true: {condition}"
            time.sleep(0.02)

    def frame_ms(self) -> float:
        """Milliseconds of a frame while the graph is moved, the mean of twenty."""
        return float(self.evaluate(_PAN_FRAME_MS))

    def text(self, selector: str) -> str:
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).textContent")

    def resize(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def box(self, selector: str) -> list[float]:
        """Left, top, width and height of an element in the window."""
        found = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        return self.evaluate(f"(r => [r.x, r.y, r.width, r.height])({found})")

    def click(self, selector: str, at: tuple[int, int] | None = None) -> None:
        """A real click of the mouse in the middle of the element (or `at` pixels from its corner)."""
        box = self.box(selector)
        dx, dy = at or (box[2] / 2, box[3] / 2)
        for kind in ("mousePressed", "mouseReleased"):
            self.call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=box[0] + dx,
                y=box[1] + dy,
                button="left",
                clickCount=1,
            )

    def drag(self, start: tuple[int, int], by: tuple[int, int], steps: int = 10) -> None:
        """Press, move, release."""
        (x, y), (dx, dy) = start, by
        moves = [("mouseMoved", x + dx * i / steps, y + dy * i / steps) for i in range(1, steps + 1)]
        for kind, at_x, at_y in (("mousePressed", x, y), *moves, ("mouseReleased", x + dx, y + dy)):
            self.call("Input.dispatchMouseEvent", type=kind, x=at_x, y=at_y, button="left", buttons=1)

    def key(self, key: str) -> None:
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        code = {"Escape": 27, "Enter": 13, "Tab": 9}.get(key, 0)  # the browser's own keys go by their code
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, text=text, windowsVirtualKeyCode=code)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def screenshot(self, path: Path) -> Path:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
        return path

    def complaints(self) -> list[str]:
        """What the page wrote to the console as an error, threw, or asked of the network."""
        found = []
        for event in self._browser.events:
            if event.get("sessionId") != self._session:
                continue
            method, params = event["method"], event["params"]
            if method == "Runtime.exceptionThrown":
                found.append(str(params["exceptionDetails"]))
            elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                found.append(str(params["args"]))
            elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(params["entry"]["text"])
            elif method == "Network.requestWillBeSent" and not params["request"]["url"].startswith(
                ("file:", "data:")
            ):
                found.append(f"asked the network for {params['request']['url']}")
        return found

    def close(self) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Chromium, or a loud skip where there is none (Debian: `apt-get install chromium`)."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip(
            "NO CHROMIUM on this machine: the page of tools/viz is not tested (apt-get install chromium)"
        )
    started = Browser(program, tmp_path_factory.mktemp("chromium"))
    yield started
    started.close()
