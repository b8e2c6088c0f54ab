"use strict";
// In:  the data, the graph shown and the page's state (main.js).
// Out: the lists and texts around the picture: stages, legend, and the tab for a node or a module. A button that leads
//      to one carries `data-jump`; input.js listens once for all of them.

const Panels = (() => {
  function el(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value);
    }
    element.append(...children.flat().filter((child) => child !== null && child !== undefined));
    return element;
  }

  const jump = (name, text = name) => el("button", { class: "jump", type: "button", "data-jump": name }, text);

  function bytes(n) {
    if (n === null || n === undefined) return "?";
    if (n < 10_000) return `${n} B`;
    const [value, unit] = n < 10e6 ? [n / 1e3, "kB"] : n < 10e9 ? [n / 1e6, "MB"] : [n / 1e9, "GB"];
    return `${value >= 100 ? value.toFixed(0) : value.toFixed(1)} ${unit}`;
  }

  const seconds = (s) => (s < 0.0995 ? `${(s * 1e3).toFixed(s < 0.01 ? 1 : 0)} ms` : `${s.toFixed(2)} s`);

  function counts(diff) {
    return [["added", "+", diff.added.size], ["removed", "−", diff.removed.size], ["changed", "~", diff.changed.size]]
      .filter(([, , n]) => n > 0)
      .map(([kind, sign, n]) => el("span", { class: `count ${kind}`, title: `${n} nodes ${kind}` }, `${sign}${n}`));
  }

  function stages(data, diffs, current) {
    return data.steps.map((step, i) => {
      const first = data.steps[0].weight_bytes;
      const share = first ? ` (${((100 * step.weight_bytes) / first).toFixed(0)}%)` : "";
      return el("li", {},
        el("button", { type: "button", class: "stage", "data-step": i, "aria-current": i === current ? "step" : null },
          el("span", { class: "line" }, el("b", {}, `${i}  ${step.name}`), el("span", { class: "counts" }, counts(diffs[i]))),
          step.options ? el("code", { class: "options", title: step.all_options }, step.options) : null,
          el("span", { class: "quiet" },
            i === 0 ? `${step.ids.length} nodes` : `${step.rewrites} rewrites · ${seconds(step.seconds)}`,
            step.misses.length ? ` · ${step.misses.length} missed` : null),
          el("span", { class: "quiet" }, `weights ${bytes(step.weight_bytes)}${i ? share : ""}`)));
    });
  }

  function legend(data, graph, faded) {
    const present = graph.root.kinds;
    return data.kinds.filter((kind) => present[kind.key]).map((kind) =>
      el("li", {}, el("button", { type: "button", "data-kind": kind.key, "aria-pressed": faded === kind.key ? "true" : "false", title: kind.meaning },
        el("i", { class: `swatch kind-${kind.key}` }), el("span", {}, kind.text), el("span", { class: "quiet" }, String(present[kind.key])))));
  }

  // The overlays to choose from, and what the chosen one's colours mean.
  function overlays(data, chosen) {
    return [["", "Kinds", "What nodes became"], ...Overlay.available(data).map((one) => [one.key, one.text, one.title])]
      .map(([key, label, title]) => el("option", { value: key, title, selected: key === (chosen ?? "") ? "" : null }, label));
  }

  function scale({ title, scale: ends, entries, worst }) {
    if (entries) return [el("p", { class: "quiet" }, title), el("ul", { class: "plain" }, entries.map(({ colour, text, n }) => el("li", { class: "entry" }, el("i", { class: "swatch", style: `--kind: ${colour}` }), el("span", {}, text), el("span", { class: "quiet" }, ` ${n}`))))];
    return [el("p", { class: "quiet" }, title), el("div", { class: "ramp" }), el("div", { class: "ends quiet" }, el("span", {}, ends[0]), el("span", {}, ends[1])),
      el("ol", { class: "plain worst" }, worst.map(({ name, spoken, text }) => el("li", {}, el("b", {}, `${text} `), jump(name, spoken))))];
  }

  function row(term, value) {
    return value === null || value === undefined || value === "" ? [] : [el("dt", {}, term), el("dd", {}, value)];
  }

  const codeBlock = (content, className = "") => el("pre", { class: className, tabindex: 0 }, content);

  const decibel = (value) => (typeof value === "number" ? `${value.toFixed(1)} dB` : value);

  function errorRows(error, name) {
    if (!error) return [];
    return [
      ...row("own error", error.isolated_db === undefined || error.isolated_db === "NaN" ? null : decibel(error.isolated_db)),
      ...row("signal to noise", decibel(error.sqnr_db)),
      ...row("largest error", Number(error.max_abs).toPrecision(3)),
      ...row("relative to largest value", error.max_rel === undefined ? null : Number(error.max_rel).toPrecision(3)),
      ...row("compared with", error.reference === name ? null : error.reference),
    ];
  }

  function nodeTab(data, graph, name) {
    const node = graph.nodes.get(name);
    if (!node) return gone(data, graph, name);
    const misses = graph.misses.get(name) ?? [];
    const error = data.errors[name] ?? Object.values(data.errors).find((e) => e.reference === name);
    return el("div", {},
      el("h2", {}, el("i", { class: `swatch kind-${node.kind}` }), node.name),
      el("p", { class: "quiet" }, node.kindText),
      findings(data, name),
      misses.length === 0 ? unasked(data, graph, node) : null,
      misses.map((miss) => el("p", { class: "miss" }, el("b", {}, "Missed: "), ...told(miss))),
      codeBlock(node.code, "wrap"),
      el("dl", {},
        row("module", node.module ? jump(`@${node.module}`, node.module) : null),
        row("your source", node.source), row("", node.source_text ? el("code", {}, node.source_text) : null),
        row("operation", node.target), row("format", node.format), row("annotation", node.note), row("rule", node.rule ? el("code", {}, node.rule) : null),
        row("shape", node.shape), row("dtype", node.dtype), row("value's bytes", node.bytes === null ? null : bytes(node.bytes)),
        moduleBytes(data, graph, node), Details.workRows(data, name), errorRows(error, name),
        row("run by", data.overlays.targets?.[name]), row("virtual node", node.virtual_node),
        row("inputs", node.args.length ? edges(graph, node) : null),
        row("read by", node.users.length ? links(node.users) : null),
        row("made from", node.origins.length ? links(node.origins) : null)),
      error === undefined && Object.keys(data.errors).length > 0 ? el("p", { class: "quiet" }, "No error figure: the unquantized graph has no value to compare this one with.") : null,
      data.regions[node.target] ? [el("h2", {}, "Inside the region"), codeBlock(data.regions[node.target], "wrap")] : null,
      Details.kernelSection(data, name), Details.weightSection(data, node.target), Details.flowSection(data, name),
      history(data, graph, name));
  }

  // What was asked and why it was not given; once, where the one has the other in it.
  const told = ({ asked, reason }) => (!asked ? [reason] : asked.includes(reason) ? [el("b", {}, asked)] : [el("b", {}, `${asked}: `), reason]);

  // What `explain` found: of one node, or the gravest of all.
  function shownFindings(data, name) {
    const all = data.overlays.findings ?? [];
    return name === null ? all.slice(0, 8) : all.filter((one) => one.node === name);
  }

  function findings(data, name) {
    return shownFindings(data, name).map((one) => el("div", { class: "finding" }, el("p", {}, one.node && name === null ? [jump(one.node, one.text)] : one.text), el("p", { class: "quiet" }, el("b", {}, "try: "), one.remedy)));
  }

  // Why a layer that could have a format has none, where nobody asked for one.
  function unasked(data, graph, node) {
    const annotated = data.steps.findIndex((step) => step.name === "annotate");
    const layer = /^(linear|conv[12]d|embedding|matmul|bmm)$/.test(node.label);
    if (annotated < 0 || graph.index < annotated || !layer || node.note || node.kind !== "untouched") return null;
    return el("p", { class: "quiet" }, "Not quantized: no rule of the recipe speaks of this layer, or its operands are no constants.");
  }

  // What comes in on each edge: its shape and format.
  function edges(graph, node) {
    return el("ul", { class: "plain" }, node.args.slice(0, 40).map((name) => {
      const from = graph.nodes.get(name);
      return el("li", {}, jump(name), el("span", { class: "quiet" }, ` ${from ? [`${from.dtype}${from.shape}`, from.format].filter(Boolean).join(" ") : ""}`));
    }), node.args.length > 40 ? el("li", {}, `and ${node.args.length - 40} more`) : null);
  }

  function links(names) {
    const shown = names.slice(0, 40).map((name) => jump(name));
    return el("span", { class: "links" }, shown, names.length > 40 ? `and ${names.length - 40} more` : null);
  }

  // Weights of the node's module in the first stage and in this one.
  function moduleBytes(data, graph, node) {
    const path = node.isGroup ? node.path : node.group;
    const before = weightBytes(data, 0, path);
    const now = weightBytes(data, graph.index, path);
    if (!before && !now) return [];
    const same = before === now || graph.index === 0;
    return row("module's weights", same ? bytes(now) : `${bytes(before)} → ${bytes(now)}`);
  }

  function weightBytes(data, stepIndex, path) {
    let total = 0;
    for (const id of data.steps[stepIndex].ids) {
      const record = data.records[id];
      const inside = !path || record.group === path || record.group.startsWith(`${path}.`);
      if (inside && record.weight_bytes) total += record.weight_bytes;
    }
    return total;
  }

  // The node in each stage where it became another one.
  function history(data, graph, name) {
    const entries = [];
    let last = null;
    data.steps.forEach((step, i) => {
      const id = step.ids.find((candidate) => data.records[candidate].name === name) ?? null;
      if (id !== last) entries.push({ i, step, record: id === null ? null : data.records[id] });
      last = id;
    });
    if (entries.length < 2) return null;
    return el("details", { open: "" }, el("summary", {}, "Through the stages"),
      el("ol", { class: "history" }, entries.map(({ i, step, record }) =>
        el("li", {}, el("button", { type: "button", class: "jump", "data-step": i }, `${i} ${step.name}`),
          record ? codeBlock(`${record.code}${record.note ? `    # ${record.note}` : ""}`, "wrap") : el("p", { class: "quiet" }, "removed")))));
  }

  // The kernels that run what was a region.
  function became(data, graph, name) {
    const kernels = (data.overlays.kernels_of?.[name] ?? []).filter((kernel) => graph.nodes.has(kernel));
    return kernels.length ? el("p", {}, "Run here by ", ...kernels.flatMap((kernel) => [jump(kernel), " "])) : null;
  }

  function gone(data, graph, name) {
    for (let i = graph.index; i >= 0; i -= 1) {
      const id = data.steps[i].ids.find((candidate) => data.records[candidate].name === name);
      if (id === undefined) continue;
      return el("div", {}, el("h2", {}, name), el("p", {}, `Not in this stage. Last seen after ${data.steps[i].name}:`), became(data, graph, name),
        codeBlock(data.records[id].code, "wrap"), history(data, graph, name));
    }
    return el("div", {}, el("h2", {}, name), el("p", {}, "Not in this stage; a later one makes it."), history(data, graph, name));
  }

  function groupTab(data, graph, path) {
    const group = graph.groups.get(path);
    if (!group) return el("p", { class: "quiet" }, `${path} has no box of its own in this stage.`);
    const kinds = data.kinds.filter((kind) => group.kinds[kind.key]);
    const within = (name) => graph.nodes.has(name) && Model.pathsAbove(graph, name).includes(path);
    const own = Object.values(data.errors).some((e) => typeof e.isolated_db === "number");
    const figure = own ? "isolated_db" : "sqnr_db";
    const worst = Object.entries(data.errors).filter(([name, e]) => typeof e[figure] === "number" && within(name))
      .sort((a, b) => a[1][figure] - b[1][figure]).slice(0, 5);
    const found = path ? [] : shownFindings(data, null);
    const said = new Set(found.map(({ node }) => node)); // once is enough
    const misses = [...graph.misses.values()].flat().filter((miss) => within(miss.node) && !said.has(miss.node));
    const inside = (line) => line.sign !== " " && path && (line.group === path || line.group.startsWith(`${path}.`));
    const changes = Model.codeLines(data, graph).filter(inside);
    return el("div", {},
      el("h2", {}, path || "the whole model"),
      path ? null : findings(data, null),
      misses.map((miss) => el("p", { class: "miss" }, el("b", {}, "Missed: "), jump(miss.node), ` ${miss.reason}`)),
      el("dl", {}, row("nodes", String(group.size)),
        row("what they became", el("ul", { class: "plain" }, kinds.map((kind) => el("li", {}, el("i", { class: `swatch kind-${kind.key}` }), ` ${group.kinds[kind.key]} ${kind.text}`)))),
        row("formats", group.formats.size ? [...group.formats].map(([format, n]) => `${format} ×${n}`).join(", ") : null),
        row("changed by this pass", group.added + group.removed + group.changed ? `${group.added} added, ${group.removed} removed, ${group.changed} changed` : "nothing"),
        moduleBytes(data, graph, group),
        row(own ? "largest own errors" : "largest errors", worst.length ? el("ul", { class: "plain" }, worst.map(([name, e]) => el("li", {}, el("b", {}, `${decibel(e[figure])} `), jump(name, Model.spoken(graph, name))))) : null)),
      changes.length ? [el("h2", {}, `What ${graph.step.name} did here`), Changes.codeOf(changes)] : null);
  }

  return { el, jump, counts, told, stages, legend, overlays, scale, nodeTab, groupTab, bytes };
})();
