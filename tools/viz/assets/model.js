"use strict";
// In:  the page's data (steps that list indices into one table of node records, see data.py).
// Out: for one step a `Graph`: nodes with users, the tree of modules over them, edges lifted to every level
//      of that tree, and what the step changed.
//
//   steps[3].ids = [0, 1, 7]  ->  graph.nodes: Map(name -> node), graph.root: {children, edges, ins, outs}
//
// Equal records share one index, so "did this node change" is one comparison of integers.

const Model = (() => {
  const OPEN_LIMIT = 48; // boxes on the first screen; more than that is not an overview any more
  const SMALL = 40; // a graph of this many nodes is shown whole

  function graphOf(data, stepIndex) {
    const step = data.steps[stepIndex];
    const nodes = new Map();
    for (const id of step.ids) {
      const record = data.records[id];
      nodes.set(record.name, { ...record, id, users: [], parent: null });
    }
    for (const node of nodes.values()) {
      for (const arg of node.args) nodes.get(arg)?.users.push(node.name);
    }
    const graph = { step, index: stepIndex, nodes, groups: new Map(), misses: missesByNode(step) };
    graph.diff = diffOf(data, stepIndex);
    graph.root = treeOf(graph);
    simplify(graph.root);
    index(graph, graph.root, null);
    countRemoved(data, graph);
    liftEdges(graph);
    return graph;
  }

  function missesByNode(step) {
    const found = new Map();
    for (const miss of step.misses) {
      if (!found.has(miss.node)) found.set(miss.node, []);
      found.get(miss.node).push(miss);
    }
    return found;
  }

  // What step `index` did: names added and removed, and names whose record is another one now.
  function diffOf(data, stepIndex) {
    const diff = { added: new Set(), removed: new Set(), changed: new Set() };
    if (stepIndex === 0) return diff;
    const before = idsByName(data, stepIndex - 1);
    const after = idsByName(data, stepIndex);
    for (const [name, id] of after) {
      if (!before.has(name)) diff.added.add(name);
      else if (before.get(name) !== id) diff.changed.add(name);
    }
    for (const name of before.keys()) if (!after.has(name)) diff.removed.add(name);
    return diff;
  }

  function idsByName(data, stepIndex) {
    return new Map(data.steps[stepIndex].ids.map((id) => [data.records[id].name, id]));
  }

  const newGroup = (path, label) => ({ path, label, isGroup: true, children: [], subgroups: new Map() });

  function treeOf(graph) {
    const root = newGroup("", "model");
    for (const node of graph.nodes.values()) {
      let group = root;
      for (const part of node.group ? node.group.split(".") : []) {
        if (!group.subgroups.has(part)) {
          const child = newGroup(group.path ? `${group.path}.${part}` : part, part);
          group.subgroups.set(part, child);
          group.children.push(child);
        }
        group = group.subgroups.get(part);
      }
      group.children.push(node);
    }
    return root;
  }

  // Boxes that say nothing go: a list of numbered layers (its layers move up), a box around one box,
  // a box around one node.
  function simplify(group) {
    const children = [];
    for (const child of group.children) {
      if (!child.isGroup) {
        children.push(child);
        continue;
      }
      simplify(child);
      const inner = child.children;
      const numbered = inner.length > 0 && inner.every((c) => c.isGroup && /^\d+($|\.)/.test(c.label));
      if (numbered || (inner.length === 1 && inner[0].isGroup)) {
        for (const grandchild of inner) grandchild.label = `${child.label}.${grandchild.label}`;
        children.push(...inner);
      } else if (inner.length === 1) {
        children.push(inner[0]);
      } else {
        children.push(child);
      }
    }
    group.children = children;
  }

  function index(graph, group, parent) {
    Object.assign(group, { parent, size: 0, kinds: {}, added: 0, changed: 0, removed: 0, missed: 0 });
    Object.assign(group, { formats: new Map(), edges: new Map(), ins: new Map(), outs: new Map() });
    graph.groups.set(group.path, group);
    for (const child of group.children) {
      if (child.isGroup) {
        index(graph, child, group);
        for (const key of ["size", "added", "changed", "missed"]) group[key] += child[key];
        for (const [kind, n] of Object.entries(child.kinds)) group.kinds[kind] = (group.kinds[kind] ?? 0) + n;
        for (const [format, n] of child.formats) group.formats.set(format, (group.formats.get(format) ?? 0) + n);
        continue;
      }
      child.parent = group;
      group.size += 1;
      group.kinds[child.kind] = (group.kinds[child.kind] ?? 0) + 1;
      if (child.format) group.formats.set(child.format, (group.formats.get(child.format) ?? 0) + 1);
      if (graph.diff.added.has(child.name)) group.added += 1;
      if (graph.diff.changed.has(child.name)) group.changed += 1;
      if (graph.misses.has(child.name)) group.missed += 1;
    }
  }

  // A removed node is counted on the deepest module of its path that is still there.
  function countRemoved(data, graph) {
    if (graph.diff.removed.size === 0) return;
    for (const id of data.steps[graph.index - 1].ids) {
      const record = data.records[id];
      if (!graph.diff.removed.has(record.name)) continue;
      let path = record.group;
      while (path && !graph.groups.has(path)) path = path.slice(0, Math.max(0, path.lastIndexOf(".")));
      for (let group = graph.groups.get(path); group; group = group.parent) group.removed += 1;
    }
  }

  function chainOf(node) {
    const chain = [];
    for (let group = node.parent; group; group = group.parent) chain.unshift(group);
    return chain;
  }

  const keyOf = (item) => (item.isGroup ? `@${item.path}` : item.name);

  function put(map, key, value) {
    if (!map.has(key)) map.set(key, new Set());
    map.get(key).add(value);
  }

  // An edge u -> v is drawn where the two paths part; the groups below that get it as a port (in or out).
  function liftEdges(graph) {
    const chains = new Map();
    for (const node of graph.nodes.values()) chains.set(node.name, [...chainOf(node), node]);
    for (const node of graph.nodes.values()) {
      const to = chains.get(node.name);
      for (const arg of node.args) {
        const from = chains.get(arg);
        if (!from) continue;
        let depth = 0;
        while (from[depth] === to[depth]) depth += 1;
        put(to[depth - 1].edges, keyOf(from[depth]), keyOf(to[depth]));
        for (let i = depth; i < to.length - 1; i += 1) put(to[i].ins, arg, keyOf(to[i + 1]));
        for (let i = depth; i < from.length - 1; i += 1) put(from[i].outs, keyOf(from[i + 1]), node.name);
      }
    }
  }

  // Open from the root downwards while the picture stays an overview; one of many like layers stays closed.
  function openByDefault(graph) {
    const open = new Set([""]);
    const whole = graph.nodes.size <= SMALL;
    let shown = graph.root.children.length;
    const queue = graph.root.children.filter((c) => c.isGroup);
    while (queue.length > 0) {
      const group = queue.shift();
      const repeated = /(^|\.)\d+$/.test(group.label);
      if (!whole && (repeated || shown + group.children.length > OPEN_LIMIT)) continue;
      open.add(group.path);
      shown += group.children.length - 1;
      queue.push(...group.children.filter((c) => c.isGroup));
    }
    return open;
  }

  // The boxes that must be open for this node to be seen.
  function pathsAbove(graph, name) {
    const node = graph.nodes.get(name);
    return node ? chainOf(node).map((group) => group.path) : [];
  }

  // Lines of the step's code beside the step before: [{sign: " " | "+" | "-" | "~", name, text}]. Names are unique
  // and keep their order, so one walk over both lists is enough.
  function codeLines(data, graph) {
    const now = graph.step.ids.map((id) => data.records[id]);
    if (graph.index === 0) return now.map((r) => ({ sign: " ", name: r.name, text: r.code }));
    const old = data.steps[graph.index - 1].ids.map((id) => data.records[id]);
    const oldByName = new Map(old.map((r) => [r.name, r]));
    const lines = [];
    let next = 0;
    const passRemoved = () => {
      while (next < old.length && graph.diff.removed.has(old[next].name)) {
        lines.push({ sign: "-", name: old[next].name, text: old[next].code });
        next += 1;
      }
    };
    const passed = new Set();
    for (const record of now) {
      const was = oldByName.get(record.name);
      while (was && next < old.length && passed.has(old[next].name)) next += 1;
      passRemoved();
      if (!was) {
        lines.push({ sign: "+", name: record.name, text: record.code });
        continue;
      }
      if (was.code !== record.code) {
        lines.push({ sign: "-", name: record.name, text: was.code });
        lines.push({ sign: "+", name: record.name, text: record.code });
      } else {
        lines.push({ sign: graph.diff.changed.has(record.name) ? "~" : " ", name: record.name, text: record.code });
      }
      passed.add(record.name);
      if (old[next]?.name === record.name) next += 1;
    }
    while (next < old.length) {
      if (graph.diff.removed.has(old[next].name)) {
        lines.push({ sign: "-", name: old[next].name, text: old[next].code });
      }
      next += 1;
    }
    return lines;
  }

  return { graphOf, openByDefault, pathsAbove, codeLines, keyOf };
})();
