"use strict";
// In:  a text, the room for it in pixels.  Out: the text cut to the room (at its end, or at its start for paths).

const Text = (() => {
  const pen = document.createElement("canvas").getContext("2d");
  const family = 'system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif'; // as in page.css
  const styles = { name: `600 12.5px ${family}`, sub: `11.5px ${family}`, port: `11px ${family}`, badge: `700 11px ${family}` };
  const widths = new Map();

  function width(content, style) {
    const key = `${style}\n${content}`;
    if (!widths.has(key)) {
      pen.font = styles[style];
      widths.set(key, pen.measureText(content).width);
    }
    return widths.get(key);
  }

  function fit(content, room, style, cut = "end") {
    if (width(content, style) <= room) return content;
    let [low, high] = [1, content.length];
    const cutTo = (n) => (cut === "end" ? `${content.slice(0, n)}…` : `…${content.slice(-n)}`);
    while (low < high) {
      const middle = Math.ceil((low + high) / 2);
      if (width(cutTo(middle), style) <= room) low = middle;
      else high = middle - 1;
    }
    return cutTo(low);
  }

  return { width, fit };
})();
