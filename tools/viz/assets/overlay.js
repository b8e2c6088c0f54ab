"use strict";
// In:  the page's data, a graph (model.js), the name of an overlay.
// Out: for each node and closed module a colour and a text, and the legend that explains them.
//
//   Overlay.paint(data, graph, "time")  ->  {colour(item), text(item), parts(group), legend: {title, entries | scale}}
//
// A closed module has the sum of what is in it (time, bytes) or the worst of it (errors). Colours of numbers run from
// --cold to --hot, mixed by the browser, so that light and dark need no tables here.

const Overlay = (() => {
  const micro = (us) => (us < 1000 ? `${us.toPrecision(3)} µs` : `${(us / 1000).toPrecision(3)} ms`);
  const decibel = (v) => (v === Infinity ? "exact" : `${v.toFixed(1)} dB`);
  const sum = (values) => values.reduce((a, b) => a + b, 0);
  const least = (values) => values.reduce((a, b) => Math.min(a, b));

  const error = (field) => (data, node) => {
    const found = data.errors[node.name]?.[field];
    return typeof found === "number" ? found : { infinite: Infinity, "-infinite": -99, NaN: -99 }[found] ?? null;
  };
  const work = (index) => (data, node) => (data.overlays.work?.[node.name] ?? data.overlays.baseline?.[node.name])?.[index] ?? null;

  const ALL = [
    { key: "isolated", text: "Own error", title: "Signal to noise of a node by itself, fed the unquantized model's values", of: error("isolated_db"), join: least, show: decibel, hot: "low" },
    { key: "error", text: "Error so far", title: "Signal to noise against the unquantized model, with all that came before", of: error("sqnr_db"), join: least, show: decibel, hot: "low" },
    { key: "time", text: "Time", title: "Microseconds of a call, operator by operator, from the profiler", of: work(2), join: sum, show: micro, hot: "high" },
    { key: "flops", text: "Operations", title: "Floating-point operations of a call", of: (data, node) => work(0)(data, node) || null, join: sum, show: (v) => `${engineering(v)}FLOP`, hot: "high" },
    { key: "moved", text: "Bytes moved", title: "Bytes that a call reads and writes", of: (data, node) => work(1)(data, node) || null, join: sum, show: (v) => Panels.bytes(v), hot: "high" },
    { key: "weights", text: "Weight bytes", title: "Bytes of weights as they are held", of: (_, node) => node.weight_bytes || null, join: sum, show: (v) => Panels.bytes(v), hot: "high" },
    { key: "format", text: "Format", title: "The format that a node works in", of: (_, node) => node.format || null, category: true },
    { key: "virtual", text: "Virtual node", title: "The slice of the machine that a node is meant for", of: (_, node) => node.virtual_node || null, category: true },
    { key: "target", text: "Target", title: "Who runs a node", of: (data, node) => data.overlays.targets?.[node.name] ?? null, category: true },
  ];

  function engineering(v) {
    const step = Math.min(4, Math.floor(Math.log10(Math.max(1, v)) / 3));
    return `${(v / 1000 ** step).toPrecision(3)} ${["", "k", "M", "G", "T"][step]}`;
  }

  // The overlays for which some step has a value.
  function available(data) {
    const any = (overlay) => data.records.some((node) => overlay.of(data, node) !== null);
    return ALL.filter(any);
  }

  // beside: [data, graph] of another trace that is seen at the same time, so that a colour means the same in both.
  function paint(data, graph, key, beside = null) {
    const overlay = ALL.find((one) => one.key === key);
    if (!overlay) return null;
    return overlay.category ? categories(data, graph, overlay, beside) : numbers(data, graph, overlay, beside);
  }

  const own = ([data, graph], overlay) => [...graph.nodes.values()].map((node) => overlay.of(data, node)).filter((value) => value !== null);

  function values(data, graph, overlay) {
    const found = new Map();
    for (const node of graph.nodes.values()) {
      const value = overlay.of(data, node);
      if (value !== null) found.set(node.name, value);
    }
    const under = (group) => group.children.flatMap((child) => (child.isGroup ? under(child) : found.has(child.name) ? [found.get(child.name)] : []));
    for (const group of graph.groups.values()) {
      const inside = under(group);
      if (inside.length > 0) found.set(Model.keyOf(group), overlay.category ? inside : overlay.join(inside));
    }
    return found;
  }

  function numbers(data, graph, overlay, beside) {
    const found = values(data, graph, overlay);
    const shown = [...own([data, graph], overlay), ...(beside ? own(beside, overlay) : [])].filter(Number.isFinite);
    const [low, high] = shown.length ? [Math.min(...shown), Math.max(...shown)] : [0, 1];
    const log = overlay.hot === "high"; // times and bytes spread over decades
    const at = (v) => (log ? Math.log(Math.max(v, high / 1e4)) : v);
    const [from, to] = log ? [at(Math.max(low, high / 1e4)), at(high)] : [low, high];
    const heat = (v) => {
      if (!Number.isFinite(v)) return 0;
      const share = to > from ? Math.min(1, Math.max(0, (at(v) - from) / (to - from))) : 1;
      return Math.round(100 * (overlay.hot === "low" ? 1 - share : share));
    };
    const value = (item) => found.get(Model.keyOf(item)) ?? null;
    const total = overlay.join === sum ? found.get("@") : null; // what is summed is shown as a share of the whole
    const share = (group) => (total ? value(group) / total : null);
    // A module is as hot as it is large beside the largest one in the same box.
    const among = (group) => {
      const largest = Math.max(...(group.parent?.children ?? [group]).filter((child) => child.isGroup).map((child) => value(child) ?? 0));
      return largest > 0 ? Math.round((100 * value(group)) / largest) : 0;
    };
    return {
      key: overlay.key,
      value,
      colour: (item) => (value(item) === null ? null : `color-mix(in oklab, var(--hot) ${item.isGroup && total ? among(item) : heat(value(item))}%, var(--cold))`),
      text: (item) => (value(item) === null ? null : `${overlay.show(value(item))}${item.isGroup && share(item) !== null ? `, ${Number((100 * share(item)).toPrecision(2))}%` : ""}`),
      parts: null,
      legend: { title: overlay.title, scale: overlay.hot === "low" ? [overlay.show(high), overlay.show(low)] : [overlay.show(log ? Math.max(low, high / 1e4) : low), overlay.show(high)], worst: ranked(graph, found, overlay) },
    };
  }

  // The nodes that matter most, for a list beside the picture.
  function ranked(graph, found, overlay) {
    const sign = overlay.hot === "low" ? 1 : -1;
    return [...graph.nodes.values()].filter((node) => Number.isFinite(found.get(node.name)))
      .sort((a, b) => sign * (found.get(a.name) - found.get(b.name))).slice(0, 8)
      .map((node) => ({ name: node.name, spoken: Model.spoken(graph, node.name), text: overlay.show(found.get(node.name)) }));
  }

  function categories(data, graph, overlay, beside) {
    const found = values(data, graph, overlay);
    const counts = new Map();
    for (const name of graph.nodes.keys()) if (found.has(name)) counts.set(found.get(name), (counts.get(found.get(name)) ?? 0) + 1);
    const both = new Set([...own([data, graph], overlay), ...(beside ? own(beside, overlay) : [])]);
    const order = beside ? [...both].sort() : [...counts].sort((a, b) => b[1] - a[1]).map(([name]) => name);
    const colourOf = (name) => `var(--c${Math.min(order.indexOf(name), 7)})`;
    const value = (item) => found.get(Model.keyOf(item)) ?? null;
    return {
      key: overlay.key,
      value,
      colour: (item) => (value(item) === null || item.isGroup ? null : colourOf(value(item))),
      text: (item) => (value(item) === null ? null : item.isGroup ? [...new Set(value(item))].join(", ") : value(item)),
      parts: (group) => order.map((name) => ({ colour: colourOf(name), n: (value(group) ?? []).filter((v) => v === name).length })).filter(({ n }) => n > 0),
      legend: { title: overlay.title, entries: order.map((name) => ({ colour: colourOf(name), text: name, n: counts.get(name) ?? 0 })) },
    };
  }

  return { ALL, available, paint, micro, decibel, engineering };
})();
