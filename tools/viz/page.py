"""One self-contained HTML file: data, drawing, layout library and colours in it, none of it loaded.

Comes in: the page's data as plain JSON. Goes out: the text of the page.

    render({"title": "fold", ...})  ->  "<!doctype html>..."

The JSON sits in a script element, so every `<` in it is escaped: a module called `</script>` ends nothing.
The page puts names into the document only as text, and its policy forbids it to load anything.
"""

from __future__ import annotations

import html
import json
from importlib.resources import files
from typing import Any

_SCRIPTS = (
    "text.js", "model.js", "layout.js", "charts.js", "draw.js", "minimap.js", "panels.js", "changes.js",
    "overlay.js", "details.js", "compare.js", "address.js", "main.js", "input.js",
)  # fmt: skip


def render(data: dict[str, Any]) -> str:
    """The page for this data."""
    library = f"<script>\n{_asset('vendor', 'dagre.min.js')}\n</script>"
    scripts = "\n".join(f"<script>\n{_asset('assets', name)}</script>" for name in _SCRIPTS)
    filled = {
        "title": html.escape(data["title"]),
        "css": _asset("assets", "page.css"),
        "data": _json(data),
        "scripts": f"{library}\n{scripts}",
    }
    # Cut at the marks first, so that a mark inside the data is only data.
    text, *parts = _asset("assets", "page.html").split("{{")
    for part in parts:
        name, rest = part.split("}}", 1)
        text += filled[name] + rest
    return text


def _asset(folder: str, name: str) -> str:
    return files(__package__).joinpath(folder, name).read_text(encoding="utf-8")


def _json(data: dict[str, Any]) -> str:
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # U+2028 and U+2029 end a line in old script parsers.
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
