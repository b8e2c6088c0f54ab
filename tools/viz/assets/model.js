"use strict";
// In:  the page's data (steps that list indices into one table of node records, see data.py).
// Out: for one step a `Graph`: nodes with users, the tree of modules over them, edges lifted to every level
//      of that tree, and what the step changed.
//
//   steps[3].ids = [0, 1, 7]  ->  graph.nodes: Map(name -> node), graph.root: {children, edges, ins, outs}
//
// What a step changed is the trace's own list; equal records of two steps share one index.

const Model = (() => {
  const OPEN_LIMIT = 48; // boxes on the first screen; more than that is not an overview any more
  const SMALL = 40; // a graph of this many nodes is shown whole
  const LOOSE = 30; // a module with more operations of its own than this has them put into boxes
  const RUN = 6; // a box around fewer says nothing
  const CHUNK = 40; // operations in such a box

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
    const misses = missesByNode(data.steps.slice(0, stepIndex + 1).flatMap((s) => s.misses));
    const graph = { step, index: stepIndex, nodes, groups: new Map(), misses };
    graph.diff = { added: new Set(step.added), removed: new Set(step.removed), changed: new Set(step.altered) };
    graph.root = treeOf(graph);
    simplify(graph.root);
    bundle(graph.root, graph);
    index(graph, graph.root, null);
    countRemoved(data, graph);
    liftEdges(graph);
    return graph;
  }

  // What was missed up to a stage stays missed in it.
  function missesByNode(misses) {
    const found = new Map();
    for (const miss of misses) {
      if (!found.has(miss.node)) found.set(miss.node, []);
      found.get(miss.node).push(miss);
    }
    return found;
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

  // Many loose operations in one module (masks and positions; or all of a model that has no modules) are put into
  // boxes: runs of connected operations with no module between them, so that the boxes never form a cycle.
  function bundle(group, graph) {
    for (const child of group.children) if (child.isGroup) bundle(child, graph);
    const loose = group.children.filter((child) => !child.isGroup && child.op !== "placeholder" && child.op !== "output");
    if (loose.length <= LOOSE) return;
    const runs = runsOf(group, graph, loose).filter((run) => run.length >= RUN);
    const boxOf = new Map();
    for (const run of runs) {
      // Chunks in execution order: an edge never leads back.
      const chunks = Math.ceil(run.length / CHUNK);
      const size = Math.ceil(run.length / chunks);
      for (let i = 0; i < run.length; i += size) {
        const nodes = run.slice(i, i + size);
        const box = newGroup(`${group.path}.·${nodes[0].name}`, `${nodes.length} operations from ${nodes[0].name}`);
        Object.assign(box, { children: nodes, bundle: true });
        for (const node of nodes) boxOf.set(node, box);
      }
    }
    group.children = [...new Set(group.children.map((child) => boxOf.get(child) ?? child))];
    if (group.children.length > 4 * CHUNK) nest(group);
  }

  // Boxes of boxes, where even the boxes are too many.
  function nest(group) {
    const boxes = group.children.filter((child) => child.bundle);
    const outer = [];
    for (let i = 0; i < boxes.length; i += CHUNK) {
      const inner = boxes.slice(i, i + CHUNK);
      outer.push(Object.assign(newGroup(`${inner[0].path}·`, inner[0].label.replace(/^\d+ /, "")), { children: inner, bundle: true }));
    }
    group.children = [...outer, ...group.children.filter((child) => !child.bundle)];
  }

  // Loose nodes, connected among themselves, with equally many modules before them on the longest way.
  function runsOf(group, graph, loose) {
    const mine = new Set(loose.map((node) => node.name));
    const inside = new Set(); // everything in the group's modules
    const collect = (child) => (child.isGroup ? child.children.forEach(collect) : inside.add(child.name));
    group.children.filter((child) => child.isGroup).forEach(collect);
    const level = new Map();
    for (const node of graph.nodes.values()) {
      let most = 0;
      for (const arg of node.args) most = Math.max(most, (level.get(arg) ?? 0) + (inside.has(arg) && !inside.has(node.name) ? 1 : 0));
      level.set(node.name, most);
    }
    const run = new Map();
    for (const first of loose) {
      if (run.has(first.name)) continue;
      const members = [];
      const open = [first.name];
      run.set(first.name, members);
      while (open.length > 0) {
        const node = graph.nodes.get(open.pop());
        members.push(node);
        for (const other of [...node.args, ...node.users]) {
          if (!mine.has(other) || run.has(other) || level.get(other) !== level.get(node.name)) continue;
          run.set(other, members);
          open.push(other);
        }
      }
    }
    const order = new Map([...graph.nodes.keys()].map((name, i) => [name, i]));
    return [...new Set(run.values())].map((members) => members.sort((a, b) => order.get(a.name) - order.get(b.name)));
  }

  function index(graph, group, parent) {
    Object.assign(group, { parent, size: 0, kinds: {}, added: 0, changed: 0, removed: 0, missed: 0 });
    Object.assign(group, { notes: new Map(), operands: new Map(), edges: new Map(), ins: new Map(), outs: new Map() });
    graph.groups.set(group.path, group);
    for (const child of group.children) {
      if (child.isGroup) {
        index(graph, child, group);
        for (const key of ["size", "added", "changed", "missed"]) group[key] += child[key];
        add(group.notes, child.notes);
        add(group.operands, child.operands);
        for (const [kind, n] of Object.entries(child.kinds)) group.kinds[kind] = (group.kinds[kind] ?? 0) + n;
        continue;
      }
      child.parent = group;
      group.size += 1;
      group.kinds[child.kind] = (group.kinds[child.kind] ?? 0) + 1;
      if (child.note) add(group.notes, [[child.note, 1]]);
      if (child.format && child.op !== "get_attr") add(group.operands, [[child.format, 1]]);
      if (graph.diff.added.has(child.name)) group.added += 1;
      if (graph.diff.changed.has(child.name)) group.changed += 1;
      if (graph.misses.has(child.name)) group.missed += 1;
    }
    // What the recipe gave says more than the formats of single operators; a graph read from a file has only those.
    group.formats = group.notes.size > 0 ? group.notes : group.operands;
  }

  function add(counts, more) {
    for (const [key, n] of more) counts.set(key, (counts.get(key) ?? 0) + n);
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

  // Open from the root downwards while the picture stays an overview; one of many like layers stays
  // closed, and so does a module that holds no other.
  function openByDefault(graph) {
    const open = new Set([""]);
    const whole = graph.nodes.size <= SMALL;
    let shown = graph.root.children.length;
    const queue = graph.root.children.filter((c) => c.isGroup);
    while (queue.length > 0) {
      const group = queue.shift();
      const repeated = /(^|\.)\d+$/.test(group.label);
      const leaf = !group.children.some((c) => c.isGroup);
      if (!whole && (repeated || leaf || shown + group.children.length > OPEN_LIMIT)) continue;
      open.add(group.path);
      shown += group.children.length - 1;
      queue.push(...group.children.filter((c) => c.isGroup));
    }
    return open;
  }

  // What a person calls a node: the end of its module's path where it computes in one, else its own name.
  function spoken(graph, name) {
    const node = graph.nodes.get(name);
    return node?.module && node.op !== "get_attr" ? `${node.module.split(".").slice(-3).join(".")} · ${node.label}` : name;
  }

  // The boxes that must be open for this node to be seen.
  function pathsAbove(graph, name) {
    const node = graph.nodes.get(name);
    return node ? chainOf(node).map((group) => group.path) : [];
  }

  // Lines of the step's code beside the step before: [{sign: " " | "+" | "-", name, group, text, source, sourceText,
  // rule}]. Names are unique and keep their order, so one walk over both lists is enough.
  function codeLines(data, graph) {
    const now = graph.step.ids.map((id) => data.records[id]);
    const line = (sign, record) => ({
      sign, name: record.name, group: record.group, text: record.note ? `${record.code}  # ${record.note}` : record.code,
      source: record.source, sourceText: record.source_text, rule: record.rule,
    });
    if (graph.index === 0) return now.map((record) => line(" ", record));
    const old = data.steps[graph.index - 1].ids.map((id) => data.records[id]);
    const oldByName = new Map(old.map((record) => [record.name, record]));
    const lines = [];
    const passed = new Set();
    let next = 0;
    const passOld = () => {
      for (; next < old.length; next += 1) {
        if (graph.diff.removed.has(old[next].name)) lines.push(line("-", old[next]));
        else if (!passed.has(old[next].name)) return;
      }
    };
    for (const record of now) {
      passOld();
      const was = oldByName.get(record.name);
      passed.add(record.name);
      if (!was) lines.push(line("+", record));
      else if (!graph.diff.changed.has(record.name)) lines.push(line(" ", record));
      else lines.push(line("-", was), line("+", record));
    }
    passOld();
    return lines;
  }

  return { graphOf, openByDefault, pathsAbove, spoken, codeLines, keyOf };
})();
