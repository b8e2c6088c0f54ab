"""A page served to this machine, made anew when the file that it comes from changes.

In: a function that makes the page, a port, the file to look at. Out: nothing, until it is stopped.

    serve(make, 8000, Path("mine.py"), print)      http://127.0.0.1:8000

Only the address of this machine is listened on. What goes wrong while the page is made is shown in its place.
"""

from __future__ import annotations

import html
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

from ..formats import BitfoldError

HOST = "127.0.0.1"


class Served:
    """The page as it was made last."""

    def __init__(self, make: Callable[[], str], file: Path | None) -> None:
        self._make, self._file, self._lock = make, file, Lock()
        self._text: str | None = None
        self._stamp: float | None = None

    def text(self) -> str:
        """The page, made now if it never was or if the file has changed since."""
        with self._lock:
            stamp = self._file.stat().st_mtime if self._file is not None and self._file.exists() else 0.0
            if self._text is None or stamp != self._stamp:
                self._text = self._made()
                self._stamp = stamp
            return self._text

    def _made(self) -> str:
        try:
            return self._make()
        except Exception as error:  # a file that is being edited fails in any way there is
            kind = "" if isinstance(error, BitfoldError) else f"{type(error).__name__}: "
            text = html.escape(f"{kind}{error}")
            return f"<!doctype html><meta charset=utf-8><title>bitfold</title><p>{text}</p>"


def server(make: Callable[[], str], port: int, file: Path | None) -> ThreadingHTTPServer:
    """Listening, not yet serving. BitfoldError if the port is taken; 0 takes any."""
    served = Served(make, file)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.split("?")[0] not in ("/", "/index.html"):
                self.send_error(404)
                return
            body = served.text().encode("utf-8", "backslashreplace")
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        raise BitfoldError(f"port {port} cannot be listened on ({error}); give another one") from error


def serve(make: Callable[[], str], port: int, file: Path | None, say: Callable[[str], None]) -> None:
    """Serve until the user stops it."""
    made = server(make, port, file)
    say(f"http://{HOST}:{made.server_address[1]} shows it; Ctrl-C stops")
    with made:
        made.serve_forever()
