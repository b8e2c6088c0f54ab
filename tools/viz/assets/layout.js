"use strict";
// In:  a group of the module tree (model.js) and the set of open groups.
// Out: the group's picture: sizes, places of its items and ports, and the edges' points.
//
//   layout(root, open)  ->  {w, h, items: [{item, x, y, w, h, inner}], ports: [...], edges: [{points, ...}]}
//
// Each open group is laid out by dagre on its own and is then one box for the group around it. So the cost is
// linear in what is open, and like layers (equal sizes, equal edges) are laid out once and share the result.

const Layout = (() => {
  const NODE = { w: 178, h: 40 };
  const GROUP = { w: 220, h: 64 };
  const HEADER = 26;
  const PAD = 12;
  const FAN_OUT = 4; // a value with more readers than this gets a small port at each of them, not a long edge
  const CHAR = 6.1; // width of a character in a port's label

  const shared = new Map();

  const sizeOf = (item) => (item.isGroup ? GROUP : NODE);

  function layout(group, open) {
    const inner = new Map();
    const boxes = group.children.map((item) => {
      const isOpen = item.isGroup && open.has(item.path);
      if (isOpen) inner.set(Model.keyOf(item), layout(item, open));
      const size = isOpen ? inner.get(Model.keyOf(item)) : sizeOf(item);
      return { key: Model.keyOf(item), item, w: size.w, h: size.h };
    });
    const { edges, ports } = connect(group);
    for (const port of ports) boxes.push({ key: port.key, port, w: 16 + CHAR * port.label.length, h: 18 });

    const placed = place(boxes, edges);
    const items = [];
    const placedPorts = [];
    boxes.forEach((box, i) => {
      const at = { x: placed.xy[i][0] + PAD, y: placed.xy[i][1] + HEADER, w: box.w, h: box.h };
      if (box.port) placedPorts.push({ ...box.port, ...at });
      else items.push({ item: box.item, ...at, inner: inner.get(box.key) });
    });
    const lines = edges.map((edge, i) => ({
      from: edge[0], to: edge[1], points: placed.lines[i].map(([x, y]) => [x + PAD, y + HEADER]),
    }));
    return {
      group, items, ports: placedPorts, edges: lines,
      w: Math.max(placed.w + 2 * PAD, 30 + 7.4 * group.label.length), h: placed.h + HEADER + PAD,
    };
  }

  // Edges between the items of one group, and the ports for what comes from or goes to the outside.
  function connect(group) {
    const edges = [];
    const portsAt = new Map(); // which readers (as a text) -> sources that they share
    const addSource = (source, readers) => {
      const key = [...readers].join("\n");
      if (!portsAt.has(key)) portsAt.set(key, { sources: [], readers: [...readers] });
      portsAt.get(key).sources.push(source);
    };
    const spread = (source, readers) => {
      if (readers.size > FAN_OUT) for (const reader of readers) addSource(source, [reader]);
      else addSource(source, readers);
    };
    for (const [from, readers] of group.edges) {
      if (readers.size > FAN_OUT) spread(from, readers);
      else for (const to of readers) edges.push([from, to]);
    }
    for (const [source, readers] of group.ins) spread(source, readers);

    const ports = [];
    for (const { sources, readers } of portsAt.values()) {
      const key = `>${ports.length}`;
      ports.push({ key, kind: "in", names: sources, label: short(sources) });
      for (const reader of readers) edges.push([key, reader]);
    }
    for (const [item, users] of group.outs) {
      const key = `<${ports.length}`;
      ports.push({ key, kind: "out", names: [...users], label: short([...users]) });
      edges.push([item, key]);
    }
    return { edges, ports };
  }

  function short(names) {
    const clip = (text) => (text.length > 22 ? `${text.slice(0, 10)}…${text.slice(-10)}` : text);
    const first = clip(names[0].startsWith("@") ? names[0].slice(1) : names[0]);
    return names.length > 1 ? `${first} +${names.length - 1}` : first;
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
