"use strict";
// In:  a layout (layout.js), the graph it is of (model.js) and what is marked (selection, search hits).
// Out: SVG elements. Every text goes in as text, never as markup, whatever a module is called.

const Draw = (() => {
  const NS = "http://www.w3.org/2000/svg";

  function svg(tag, attributes = {}, ...children) {
    const element = document.createElementNS(NS, tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (value !== null && value !== undefined) element.setAttribute(key, value);
    }
    element.append(...children.filter((child) => child !== null));
    return element;
  }

  const text = (x, y, content, className) => svg("text", { x, y, class: className }, content);

  // Points of dagre's polyline as one smooth line.
  function pathOf(points) {
    const [start, ...rest] = points;
    let d = `M${start[0].toFixed(1)},${start[1].toFixed(1)}`;
    if (rest.length === 1) return `${d}L${rest[0].map((v) => v.toFixed(1))}`;
    for (let i = 0; i < rest.length - 1; i += 1) {
      const last = i === rest.length - 2;
      const mid = last ? rest[i + 1] : [(rest[i][0] + rest[i + 1][0]) / 2, (rest[i][1] + rest[i + 1][1]) / 2];
      d += `Q${rest[i].map((v) => v.toFixed(1))} ${mid.map((v) => v.toFixed(1))}`;
    }
    return d;
  }

  function arrow() {
    const head = svg("marker", { id: "arrow", viewBox: "0 0 8 8", refX: 7.5, refY: 4, markerWidth: 8, markerHeight: 8, markerUnits: "userSpaceOnUse", orient: "auto" });
    head.append(svg("path", { d: "M0,0.8L8,4L0,7.2z" }));
    return svg("defs", {}, head);
  }

  function picture(laid, graph, open) {
    const edges = svg("g", { class: "edges" });
    const boxes = svg("g", { class: "boxes" });
    for (const edge of laid.edges) {
      edges.append(svg("path", {
        d: pathOf(edge.points), class: "edge", "marker-end": "url(#arrow)", "data-from": edge.from, "data-to": edge.to,
      }));
    }
    for (const port of laid.ports) boxes.append(portOf(port, graph));
    for (const placed of laid.items) {
      if (placed.inner) boxes.append(openGroup(placed, graph, open));
      else if (placed.item.isGroup) boxes.append(closedGroup(placed, graph));
      else boxes.append(nodeBox(placed, graph));
    }
    return svg("g", {}, edges, boxes);
  }

  function portOf(port, graph) {
    const names = port.names.map((name) => (name.startsWith("@") ? name.slice(1) : name));
    const title = `${port.kind === "in" ? "from" : "to"} ${names.join(", ")}`;
    const known = port.names.find((name) => graph.nodes.has(name) || name.startsWith("@"));
    return svg("g", { class: `port ${port.kind}`, transform: `translate(${port.x},${port.y})`, "data-jump": known ?? null },
      svg("title", {}, title),
      svg("rect", { width: port.w, height: port.h, rx: 9 }),
      svg("text", { x: port.w / 2, y: 12.5, "text-anchor": "middle" }, port.label));
  }

  function openGroup(placed, graph, open) {
    const group = placed.item;
    const header = svg("g", { class: "header", "data-key": Model.keyOf(group), tabindex: -1, role: "button", "aria-expanded": "true", "aria-label": `${group.path}, open, ${group.size} nodes` },
      svg("rect", { width: placed.w, height: 22, rx: 6, class: "bar" }),
      svg("text", { x: placed.w / 2, y: 15, class: "name", "text-anchor": "middle" }, `▾ ${Text.fit(group.label, placed.w - 40, "name")}`));
    return svg("g", { class: "group open", transform: `translate(${placed.x},${placed.y})` },
      svg("rect", { width: placed.w, height: placed.h, rx: 6, class: "frame" }), header,
      picture(placed.inner, graph, open));
  }

  function closedGroup(placed, graph) {
    const group = placed.item;
    const told = graph.paint?.text(group);
    const formats = [...group.formats.keys()];
    const marks = changeMarks(group);
    const label = `${group.path}, closed, ${group.size} nodes${formats.length ? `, ${formats.join(", ")}` : ""}${group.missed ? `, ${group.missed} missed` : ""}`;
    const box = svg("g", { class: `group closed${group.missed ? " missed" : ""}`, transform: `translate(${placed.x},${placed.y})`, "data-key": Model.keyOf(group), tabindex: -1, role: "button", "aria-expanded": "false", "aria-label": label },
      svg("title", {}, label),
      svg("rect", { width: placed.w, height: placed.h, rx: 6, class: "frame" }),
      text(9, 18, "▸", "fold"), text(22, 18, Text.fit(group.label, placed.w - 30, "name", "start"), "name"),
      text(10, 36, Text.fit([`${group.size} nodes`, ...(told ? [told] : graph.paint ? [] : formats)].join(" · "), placed.w - 20, "sub"), "sub"));
    box.append(...bar(placed, graph));
    if (marks) box.append(badge(placed.w - 8, 0, marks, "change"));
    if (group.missed) box.append(badge(placed.w - 8, placed.h, `! ${group.missed}`, "miss"));
    return box;
  }

  // A module's parts as a bar: shares of kinds or of an overlay's categories, or one colour for its number.
  function bar(placed, graph) {
    const group = placed.item;
    const order = (kind) => graph.kindOrder.indexOf(kind);
    const colour = graph.paint?.colour(group);
    const parts = graph.paint?.parts?.(group)
      ?? (graph.paint ? [{ colour: colour ?? "transparent", n: 1 }] : Object.entries(group.kinds).sort(([a], [b]) => order(a) - order(b)).map(([kind, n]) => ({ className: `kind-${kind}`, n })));
    const all = parts.reduce((sum, { n }) => sum + n, 0);
    let x = 10;
    return parts.map(({ className = "", colour: fill = null, n }) => {
      const w = ((placed.w - 20) * n) / all;
      const rect = svg("rect", { x, y: 46, width: Math.max(1, w - 1), height: 8, class: `${className} share`, style: fill ? `--kind: ${fill}` : null });
      x += w;
      return rect;
    });
  }

  function changeMarks(group) {
    return [["+", group.added], ["−", group.removed], ["~", group.changed]]
      .filter(([, n]) => n > 0).map(([sign, n]) => `${sign}${n}`).join(" ");
  }

  function badge(right, y, content, className) {
    const w = Math.max(16, 12 + Text.width(content, "badge"));
    return svg("g", { class: `badge ${className}`, transform: `translate(${right - w},${y - 8})` },
      svg("rect", { width: w, height: 16, rx: 8 }), svg("text", { x: w / 2, y: 11.5, "text-anchor": "middle" }, content));
  }

  function nodeBox(placed, graph) {
    const node = placed.item;
    const change = graph.marks.get(node.name);
    const missed = graph.misses.has(node.name);
    const within = node.module && node.parent && node.module.startsWith(node.parent.path)
      ? node.module.slice(node.parent.path.length).replace(/^\./, "") : node.module;
    const name = within && node.op.startsWith("call_") ? `${node.label} · ${within}` : node.label;
    const label = `${node.name}, ${node.label}${node.format ? `, ${node.format}` : ""}, ${node.kindText}${change ? `, ${change}` : ""}${missed ? ", missed" : ""}`;
    const [colour, told] = [graph.paint?.colour(node), graph.paint?.text(node)];
    const sub = told || node.note || node.format || [node.shape, node.dtype].filter(Boolean).join(" ");
    const painted = graph.paint ? (colour ? " painted" : " unpainted") : "";
    const box = svg("g", { class: `node kind-${node.kind}${painted}${change ? ` ${change}` : ""}${missed ? " missed" : ""}`, transform: `translate(${placed.x},${placed.y})`, "data-key": node.name, tabindex: -1, role: "button", "aria-label": told ? `${label}, ${told}` : label, style: colour ? `--kind: ${colour}` : null },
      svg("title", {}, `${label}${told ? `\n${told}` : ""}\n${node.module || ""}`),
      svg("rect", { width: placed.w, height: placed.h, rx: 5, class: "frame" }),
      svg("rect", { width: 5, height: placed.h, rx: 2, class: "stripe" }),
      text(12, 16, Text.fit(name, placed.w - 20, "name", node.op === "get_attr" ? "start" : "end"), "name"),
      text(12, 32, Text.fit(sub, placed.w - 20, "sub"), "sub"));
    if (change) box.append(badge(placed.w - 2, 1, { added: "+", removed: "−", changed: "~" }[change], `change ${change}`));
    if (missed) box.append(badge(placed.w - 2, placed.h, "!", "miss"));
    return box;
  }

  return { arrow, picture };
})();
