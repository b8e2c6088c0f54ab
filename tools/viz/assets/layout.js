"use strict";
// In:  a group of the module tree (model.js) and the set of open groups.
// Out: the group's picture: sizes, places of its items and ports, and the edges' points.
//
//   layout(root, open)  ->  {w, h, items: [{item, x, y, w, h, inner}], ports: [...], edges: [{points, ...}]}
//
// Each open group is laid out by dagre on its own and is then one box for the group around it. So the cost is
// linear in what is open, and like layers (equal sizes, equal edges) are laid out once and share the result.

const Layout = (() => {
  const NODE = { w: 200, h: 40 };
  const GROUP = { w: 228, h: 64 };
  const HEADER = 26;
  const PAD = 12;
  const FAN_OUT = 4; // a value with more readers than this gets a small port at each of them, not a long edge
  const PORT = 22; // height of the row of ports on a box

  const shared = new Map();

  const sizeOf = (item) => (item.isGroup ? GROUP : NODE);

  function layout(group, open, graph) {
    const { edges, ports, above, below } = connect(group, graph);
    const boxes = group.children.map((item) => {
      const key = Model.keyOf(item);
      const inner = item.isGroup && open.has(item.path) ? layout(item, open, graph) : null;
      const { w, h } = inner ?? sizeOf(item);
      const [top, bottom] = [above.has(key) ? PORT : 0, below.has(key) ? PORT : 0];
      return { key, item, inner, top, bottom, w, h: h + top + bottom };
    });
    for (const port of ports) boxes.push({ key: port.key, port, top: 0, bottom: 0, w: port.w, h: port.h });

    const placed = place(boxes, edges);
    const items = [];
    const drawnPorts = [];
    boxes.forEach(({ key, item, inner, port, top, bottom, w, h }, i) => {
      const [x, y] = [placed.xy[i][0] + PAD, placed.xy[i][1] + HEADER];
      if (port) {
        drawnPorts.push({ ...port, x, y, w, h });
        return;
      }
      items.push({ item, inner, x, y: y + top, w, h: h - top - bottom });
      const room = w - (item.isGroup ? 100 : 32); // the badges have the corners at the right
      if (top) drawnPorts.push({ ...portOf("in", above.get(key), room, graph), x: x + 8, y: y + 1 });
      if (bottom) drawnPorts.push({ ...portOf("out", below.get(key), room, graph), x: x + 8, y: y + h - PORT + 3 });
    });
    const position = new Map(boxes.map((box, i) => [box.key, i]));
    const lines = edges.map(([from, to], i) => {
      const points = [...placed.lines[i]];
      const end = (key, point) => {
        const at = position.get(key);
        return reach(boxes[at], placed.xy[at], point);
      };
      points.unshift(...end(from, points[0]));
      points.push(...end(to, points[points.length - 1]));
      return { from, to, points: points.map(([x, y]) => [x + PAD, y + HEADER]) };
    });
    const w = Math.max(placed.w + 2 * PAD, 40 + Text.width(group.label, "name"));
    return { group, items, ports: drawnPorts, edges: lines, w, h: placed.h + HEADER + PAD };
  }

  // An edge goes past the ports that sit on a box to the box itself: the point to add, if any.
  function reach(box, [, y], point) {
    if (box.top && Math.abs(point[1] - y) < 1) return [[point[0], y + box.top]];
    if (box.bottom && Math.abs(point[1] - y - box.h) < 1) return [[point[0], y + box.h - box.bottom]];
    return [];
  }

  // Edges between the items of one group, and the ports for what comes from or goes to the outside. A port with one
  // item sits on it (`above`, `below`: item -> names); a port shared by some is a box of its own.
  function connect(group, graph) {
    const edges = [];
    const above = new Map();
    const below = new Map();
    const sharedPorts = new Map(); // its readers as a text -> {sources, readers}
    const enter = (source, readers) => {
      if (readers.size > 1 && readers.size <= FAN_OUT) {
        const key = [...readers].join("\n");
        if (!sharedPorts.has(key)) sharedPorts.set(key, { sources: [], readers });
        sharedPorts.get(key).sources.push(source);
        return;
      }
      for (const reader of readers) above.set(reader, [...(above.get(reader) ?? []), source]);
    };
    for (const [from, readers] of group.edges) {
      if (readers.size > FAN_OUT) enter(from, readers);
      else for (const to of readers) edges.push([from, to]);
    }
    for (const [source, readers] of group.ins) enter(source, readers);
    for (const [item, users] of group.outs) below.set(item, [...users]);

    const ports = [...sharedPorts.values()].map(({ sources, readers }, i) => {
      for (const reader of readers) edges.push([`>${i}`, reader]);
      return { key: `>${i}`, ...portOf("in", sources, 220, graph) };
    });
    return { edges, ports, above, below };
  }

  // The end of a module's path; for a box of loose operations its first one; for a node with a long name its module.
  function nameOf(name, graph) {
    if (name.startsWith("@")) {
      const bundled = name.indexOf("·");
      return bundled < 0 ? name.slice(1).split(".").slice(-2).join(".") : `${name.slice(bundled + 1).replace("·", "")}…`;
    }
    const node = graph.nodes.get(name);
    return name.length > 18 && node?.module && node.op !== "get_attr" ? node.module.split(".").pop() : name;
  }

  // A small label: as many of the names as there is room for.
  function portOf(kind, names, room, graph) {
    const texts = [...new Set(names.map((name) => nameOf(name, graph)))];
    const sign = kind === "in" ? "" : "→ ";
    const more = (n) => (n < texts.length ? ` +${texts.length - n}` : "");
    let shown = 1;
    const labelOf = (n) => `${sign}${texts.slice(0, n).join(", ")}${more(n)}`;
    while (shown < texts.length && Text.width(labelOf(shown + 1), "port") <= room - 16) shown += 1;
    const label = shown > 1 ? labelOf(shown) : `${sign}${Text.fit(texts[0], Math.max(60, room - 50), "port", "start")}${more(1)}`;
    return { kind, names, label, w: 16 + Text.width(label, "port"), h: 18 };
  }

  // dagre by numbers alone, so that groups of the same shape hit the cache.
  function place(boxes, edges) {
    const position = new Map(boxes.map((box, i) => [box.key, i]));
    const pairs = edges.map(([from, to]) => [position.get(from), position.get(to)]);
    const signature = JSON.stringify([boxes.map((b) => [Math.round(b.w), Math.round(b.h)]), pairs]);
    if (!shared.has(signature)) shared.set(signature, run(boxes, pairs));
    return shared.get(signature);
  }

  function run(boxes, pairs) {
    const graph = new dagre.graphlib.Graph({ multigraph: false });
    graph.setGraph({ rankdir: "TB", nodesep: 18, edgesep: 8, ranksep: 26, ranker: boxes.length > 300 ? "longest-path" : "tight-tree" });
    graph.setDefaultEdgeLabel(() => ({}));
    boxes.forEach((box, i) => graph.setNode(String(i), { width: box.w, height: box.h }));
    for (const [from, to] of pairs) graph.setEdge(String(from), String(to), { weight: boxes[from].port ? 1 : 3 });
    dagre.layout(graph);
    const xy = boxes.map((box, i) => {
      const { x, y } = graph.node(String(i));
      return [x - box.w / 2, y - box.h / 2];
    });
    const lines = pairs.map(([from, to]) => graph.edge(String(from), String(to)).points.map((p) => [p.x, p.y]));
    const { width, height } = graph.graph();
    return { xy, lines, w: Math.max(0, width || 0), h: Math.max(0, height || 0) };
  }

  return { layout };
})();
