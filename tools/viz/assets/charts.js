"use strict";
// In:  counts, points, lines as plain numbers.
// Out: small SVG pictures: a histogram, bars of codes, a scatter with logarithmic axes (roofline) or plain ones (Pareto).

const Charts = (() => {
  const NS = "http://www.w3.org/2000/svg";

  function svg(tag, attributes = {}, ...children) {
    const element = document.createElementNS(NS, tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (value !== null && value !== undefined) element.setAttribute(key, value);
    }
    element.append(...children.flat().filter((child) => child !== null));
    return element;
  }

  const short = (v) => (v === 0 ? "0" : Math.abs(v) >= 1e4 || Math.abs(v) < 1e-2 ? v.toExponential(1) : String(Number(v.toPrecision(3))));

  // Counts of equal bins. Heights are square roots, so that the tails, which matter here, are seen.
  function histogram({ low, high, counts, other }, label) {
    if (counts.length === 0) return svg("svg", { class: "chart", viewBox: "0 0 300 20" }, svg("text", { x: 0, y: 14 }, "no finite values"));
    const most = Math.max(...counts);
    const w = 300 / counts.length;
    const bars = counts.map((n, i) => (n === 0 ? null : svg("rect", { x: i * w, width: Math.max(0.6, w - 0.5), y: 60 - 58 * Math.sqrt(n / most), height: 58 * Math.sqrt(n / most), class: "bar" }, svg("title", {}, `${short(low + ((high - low) * i) / counts.length)} .. ${short(low + ((high - low) * (i + 1)) / counts.length)}: ${n}`))));
    const zero = low < 0 && high > 0 ? svg("line", { x1: (-300 * low) / (high - low), x2: (-300 * low) / (high - low), y1: 0, y2: 60, class: "zero" }) : null;
    return svg("svg", { class: "chart", viewBox: "0 0 300 76", role: "img", "aria-label": `${label}, from ${short(low)} to ${short(high)}` },
      bars, zero, svg("line", { x1: 0, x2: 300, y1: 60, y2: 60, class: "axis" }),
      svg("text", { x: 0, y: 73 }, short(low)), svg("text", { x: 300, y: 73, "text-anchor": "end" }, short(high)),
      other ? svg("text", { x: 150, y: 73, "text-anchor": "middle" }, `${other} not finite`) : null);
  }

  // How often each code is used; codes that are never used are marked below the axis.
  function codes(pairs, label) {
    const most = Math.max(1, ...pairs.map(([, n]) => n));
    const w = 300 / pairs.length;
    const bars = pairs.map(([value, n], i) => (n > 0
      ? svg("rect", { x: i * w, width: Math.max(0.6, w - 0.5), y: 60 - 58 * Math.sqrt(n / most), height: 58 * Math.sqrt(n / most), class: i === 0 || i === pairs.length - 1 ? "bar end" : "bar" }, svg("title", {}, `code ${short(value)}: ${n}`))
      : svg("rect", { x: i * w, width: Math.max(0.6, w - 0.5), y: 60, height: 3, class: "unused" }, svg("title", {}, `code ${short(value)}: never`))));
    return svg("svg", { class: "chart", viewBox: "0 0 300 76", role: "img", "aria-label": label }, bars,
      svg("line", { x1: 0, x2: 300, y1: 60, y2: 60, class: "axis" }),
      svg("text", { x: 0, y: 74 }, short(pairs[0][0])), svg("text", { x: 300, y: 74, "text-anchor": "end" }, short(pairs[pairs.length - 1][0])));
  }

  // Ticks with as many digits as tell them apart.
  function ticksOf(values) {
    for (let digits = 3; digits < 8; digits += 1) {
      const texts = values.map((v) => (Math.abs(v) >= 1e4 || (v !== 0 && Math.abs(v) < 1e-2) ? v.toExponential(digits - 2) : String(Number(v.toPrecision(digits)))));
      if (new Set(texts).size === texts.length) return texts;
    }
    return values.map(String);
  }

  const BOX = { left: 46, right: 10, top: 10, bottom: 34, w: 420, h: 260 };

  function axis(values, log) {
    const [low, high] = [Math.min(...values), Math.max(...values)];
    if (log) {
      const [from, to] = [Math.floor(Math.log10(low)), Math.max(Math.ceil(Math.log10(high)), Math.floor(Math.log10(low)) + 1)];
      const ticks = Array.from({ length: to - from + 1 }, (_, i) => 10 ** (from + i));
      return { at: (v) => (Math.log10(v) - from) / (to - from), ticks };
    }
    const step = 10 ** Math.floor(Math.log10(Math.max(high - low, 1e-9)));
    const unit = (high - low) / step < 2 ? step / 4 : (high - low) / step < 5 ? step / 2 : step;
    const [from, to] = [Math.floor(low / unit) * unit, Math.ceil(high / unit + 1e-9) * unit || unit];
    const ticks = Array.from({ length: Math.round((to - from) / unit) + 1 }, (_, i) => from + i * unit);
    return { at: (v) => (to > from ? (v - from) / (to - from) : 0.5), ticks };
  }

  // points: [{x, y, text, jump, group}]; lines: [[{x, y}, ...]]; logarithmic if `log`.
  function scatter({ points, lines = [], x, y, log = false, label }) {
    const all = [...points, ...lines.flat()];
    const [ax, ay] = [axis(all.map((p) => p.x), log), axis(all.map((p) => p.y), log)];
    const px = (v) => BOX.left + ax.at(v) * (BOX.w - BOX.left - BOX.right);
    const py = (v) => BOX.h - BOX.bottom - ay.at(v) * (BOX.h - BOX.top - BOX.bottom);
    const [tx, ty] = [ticksOf(ax.ticks), ticksOf(ay.ticks)];
    const grid = [
      ...ax.ticks.map((t, i) => [svg("line", { x1: px(t), x2: px(t), y1: BOX.top, y2: BOX.h - BOX.bottom, class: "grid" }), svg("text", { x: px(t), y: BOX.h - BOX.bottom + 13, "text-anchor": "middle" }, tx[i])]),
      ...ay.ticks.map((t, i) => [svg("line", { x1: BOX.left, x2: BOX.w - BOX.right, y1: py(t), y2: py(t), class: "grid" }), svg("text", { x: BOX.left - 4, y: py(t) + 4, "text-anchor": "end" }, ty[i])]),
    ].flat();
    const drawn = lines.map((line) => svg("polyline", { points: line.map((p) => `${px(p.x)},${py(p.y)}`).join(" "), class: "roof" }));
    const dots = points.map((p) => svg("circle", { cx: px(p.x), cy: py(p.y), r: 4.5, class: `dot${p.jump ? " jump-dot" : ""}`, "data-jump": p.jump ?? null, style: p.colour ? `--dot: ${p.colour}` : null }, svg("title", {}, p.text)));
    // A name stands on the side that has more room, and is cut where even that is too little.
    const named = points.filter((p) => p.name).map((p) => {
      const left = px(p.x) > BOX.w / 2;
      const room = left ? px(p.x) - BOX.left - 8 : BOX.w - px(p.x) - 8;
      return svg("text", { x: px(p.x) + (left ? -7 : 7), y: py(p.y) + 4, "text-anchor": left ? "end" : "start", class: "named" }, Text.fit(p.name, room, "badge"));
    });
    return svg("svg", { class: "chart plot", viewBox: `0 0 ${BOX.w} ${BOX.h}`, role: "img", "aria-label": label }, grid, drawn, dots, named,
      svg("text", { x: (BOX.left + BOX.w) / 2, y: BOX.h - 4, "text-anchor": "middle" }, x),
      svg("text", { x: 0, y: 0, transform: `translate(10,${BOX.h / 2 - 10}) rotate(-90)`, "text-anchor": "middle" }, y));
  }

  return { histogram, codes, scatter, short };
})();
