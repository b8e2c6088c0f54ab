"use strict";
// In:  the data of two traces of one model (`data` and `data.other`), two recipes or two versions.
// Out: what differs, module by module: format, kernel, own error, time; and in the graph: nodes that one side lacks.
//
// Sides are called A and B. A row is a module that either side gave a format, or of which a number is known.

const Compare = (() => {
  const el = (...given) => Panels.el(...given);

  // Module -> what one side made of it.
  function facts(data) {
    const found = new Map();
    const of = (path) => {
      if (!found.has(path)) found.set(path, { format: "", own: null, us: null, kernels: [] });
      return found.get(path);
    };
    const last = new Map();
    for (const step of data.steps) for (const id of step.ids) {
      const record = data.records[id];
      if (record.note) of(record.module).format = record.note;
      last.set(record.name, record);
    }
    for (const [name, error] of Object.entries(data.errors)) {
      const record = last.get(name);
      const own = typeof error.isolated_db === "number" ? error.isolated_db : null;
      if (!record?.module || own === null || !(record.note || found.has(record.module))) continue;
      const there = of(record.module);
      there.own = there.own === null ? own : Math.min(there.own, own);
    }
    for (const id of data.steps[data.steps.length - 1].ids) {
      const { name, module } = data.records[id];
      const work = data.overlays.work?.[name];
      const kernel = data.overlays.kernels?.[name];
      if (!found.has(module)) continue;
      if (work?.[2]) of(module).us = (of(module).us ?? 0) + work[2];
      if (kernel) of(module).kernels.push(`${kernel.spec}${kernel.schedule ? ` (${kernel.schedule})` : ""}`);
    }
    return found;
  }

  function totals(data) {
    const last = data.steps[data.steps.length - 1];
    const final = new Set(last.ids.map((id) => data.records[id].name));
    const us = Object.entries(data.overlays.work ?? {}).filter(([name]) => final.has(name)).reduce((a, [, w]) => a + (w[2] ?? 0), 0);
    const result = [...last.ids].map((id) => data.records[id]).find((record) => record.op === "output")?.args[0];
    const error = Object.values(data.errors).pop()?.sqnr_db;
    return { nodes: last.ids.length, bytes: last.weight_bytes, missed: data.steps.reduce((a, s) => a + s.misses.length, 0), us: us || null, error: typeof error === "number" ? error : null, result };
  }

  const shown = {
    own: (v) => (v === null ? "–" : `${v.toFixed(1)} dB`),
    us: (v) => (v === null ? "–" : Overlay.micro(v)),
  };

  // A difference in a measured time is one from a tenth on.
  function differs(a, b) {
    const slower = a.us !== null && b.us !== null && Math.abs(a.us - b.us) > 0.1 * Math.max(a.us, b.us);
    return { format: a.format !== b.format, kernels: a.kernels.join() !== b.kernels.join(), own: Math.abs((a.own ?? 0) - (b.own ?? 0)) > 0.05, us: slower };
  }

  function cell(side, marks) {
    const line = (key, text) => (text ? el("div", { class: marks[key] ? "differs" : null }, text) : null);
    return el("td", {}, line("format", side.format || "as it was"), line("own", side.own === null ? null : shown.own(side.own)), line("us", side.us === null ? null : shown.us(side.us)), line("kernels", side.kernels.join("; ")));
  }

  function tab(data, graph, otherGraph) {
    const [a, b] = [facts(data), facts(data.other)];
    const empty = { format: "", own: null, us: null, kernels: [] };
    const rows = [...new Set([...a.keys(), ...b.keys()])].map((path) => {
      const [left, right] = [a.get(path) ?? empty, b.get(path) ?? empty];
      return { path, left, right, marks: differs(left, right) };
    });
    const different = rows.filter(({ marks }) => marks.format || marks.kernels || marks.own || marks.us);
    const [ta, tb] = [totals(data), totals(data.other)];
    const only = (from, to) => [...from.nodes.keys()].filter((name) => !to.nodes.has(name));
    const total = (term, show, key) => el("tr", {}, el("th", { scope: "row" }, term), el("td", { class: ta[key] === tb[key] ? null : "differs" }, show(ta[key])), el("td", { class: ta[key] === tb[key] ? null : "differs" }, show(tb[key])));
    const names = (list) => (list.length ? el("p", { class: "links" }, list.slice(0, 30).map((name) => el("button", { class: "jump", type: "button", "data-jump": name }, name)), list.length > 30 ? `and ${list.length - 30} more` : null) : el("p", { class: "quiet" }, "none"));
    return el("div", { class: "compare" },
      el("table", {}, el("thead", {}, el("tr", {}, el("th", {}), el("th", { scope: "col" }, `A  ${data.title}`), el("th", { scope: "col" }, `B  ${data.other.title}`))),
        el("tbody", {}, total("weights", Panels.bytes, "bytes"), total("nodes", String, "nodes"), total("missed", String, "missed"), total("time", shown.us, "us"), total("error at the end", shown.own, "error"))),
      el("h2", {}, `${different.length} of ${rows.length} modules differ`),
      el("table", {}, el("tbody", {}, different.slice(0, 400).map(({ path, left, right, marks }) => [
        el("tr", { class: "module" }, el("th", { scope: "row", colspan: 2 }, el("button", { class: "jump", type: "button", "data-jump": graph.groups.has(path) ? `@${path}` : [...graph.nodes.values()].find((n) => n.module === path)?.name ?? `@${path}` }, path || "the model itself"))),
        el("tr", {}, cell(left, marks), cell(right, marks))]).flat())),
      el("h2", {}, "Nodes that only A has"), names(only(graph, otherGraph)),
      el("h2", {}, "Nodes that only B has"), names(only(otherGraph, graph)));
  }

  // What one graph has that the other has not, for colours in the picture.
  function marks(graph, otherGraph) {
    const found = new Map();
    for (const node of graph.nodes.values()) {
      const twin = otherGraph.nodes.get(node.name);
      if (!twin) found.set(node.name, "added");
      else if (twin.code !== node.code || twin.format !== node.format || twin.note !== node.note) found.set(node.name, "changed");
    }
    return found;
  }

  // The same node on the other side, for the panel.
  function twinSection(data, otherGraph, name) {
    const node = otherGraph.nodes.get(name);
    const error = data.other.errors[name];
    const us = data.other.overlays.work?.[name]?.[2];
    return el("section", {}, el("h2", {}, `In B, ${data.other.title}`), node
      ? [el("pre", { class: "wrap" }, `${node.code}${node.note ? `    # ${node.note}` : ""}`),
        el("p", { class: "quiet" }, [node.format, typeof error?.isolated_db === "number" ? `own error ${error.isolated_db.toFixed(1)} dB` : "", us ? Overlay.micro(us) : ""].filter(Boolean).join(" · "))]
      : el("p", { class: "quiet" }, "not there"));
  }

  return { tab, marks, twinSection, facts };
})();
