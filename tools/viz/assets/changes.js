"use strict";
// In:  the data, the graph shown.
// Out: the tabs of what a pass did: lines that changed under the user's line and the rule that they come from, what was
//      asked for and not done, and the graph's code with both in it.

const Changes = (() => {
  const { el, jump, counts, told } = Panels;

  // Lines that changed, a fold for each layer of the model; the first one is open.
  function changesTab(data, graph) {
    if (graph.index === 0) return el("p", { class: "quiet" }, "This is the graph the pipeline began with.");
    const byLayer = new Map();
    for (const line of Model.codeLines(data, graph)) {
      if (line.sign === " ") continue;
      const layer = /^(.*?\.\d+)(\.|$)/.exec(line.group)?.[1] ?? line.group;
      if (!byLayer.has(layer)) byLayer.set(layer, []);
      byLayer.get(layer).push(line);
    }
    const folds = [...byLayer].map(([layer, lines], i) => {
      const count = (sign) => lines.filter((line) => line.sign === sign).length;
      const head = el("summary", {}, layer || "the model itself", " ", el("span", { class: "quiet" }, `${count("+")} lines in, ${count("-")} out`));
      return laterFold(head, () => bySource(lines), i === 0);
    });
    return el("div", {}, el("h2", {}, `What ${graph.step.name} did`),
      el("p", { class: "counts" }, counts(graph.diff)),
      folds.length ? folds : el("p", { class: "quiet" }, "Nothing in the graph."));
  }

  // Changed lines under the line of the user's model that they come from, and the recipe's rule that decided on them. A
  // weight has no line of its own: it stands with what comes behind it.
  function bySource(lines) {
    const groups = new Map();
    let waiting = [];
    const put = (key, more) => groups.set(key, [...(groups.get(key) ?? []), ...more]);
    for (const line of lines) {
      waiting.push(line);
      if (!line.source) continue;
      put(`${line.source}\n${line.sourceText}`, waiting);
      waiting = [];
    }
    if (waiting.length) put("", waiting);
    return el("div", {}, [...groups.values()].map((same) => {
      const rules = [...new Set(same.map((line) => line.rule).filter(Boolean))];
      const { source, sourceText } = same.find((line) => line.source) ?? same[0];
      return [
        source || rules.length ? el("p", { class: "cause" }, source ? [el("b", {}, source), " ", el("code", {}, sourceText)] : null, rules.map((rule) => el("span", { class: "rule" }, `rule ${rule}`))) : null,
        codeOf(same)];
    }).flat());
  }

  // A fold whose inside is made when it is first opened.
  function laterFold(summary, make, open) {
    const fold = el("details", { open: open ? "" : null }, summary);
    const fill = () => {
      if (fold.open && fold.children.length === 1) fold.append(make());
    };
    fold.addEventListener("toggle", fill);
    if (open) fill();
    return fold;
  }

  function missesTab(graph) {
    const misses = [...graph.misses.values()].flat();
    if (misses.length === 0) return el("p", { class: "quiet" }, "Everything that was asked for up to this stage was done.");
    return el("div", {}, el("h2", {}, "Asked for and not done"),
      el("ul", { class: "misses" }, misses.map((miss) => el("li", {}, jump(miss.node),
        miss.module ? el("span", { class: "quiet" }, ` ${miss.module}`) : null,
        el("p", {}, ...told(miss)),
        miss.source ? el("p", { class: "quiet" }, miss.source) : null))));
  }

  function codeTab(data, graph) {
    return el("div", {}, el("h2", {}, `The graph after ${graph.step.name}`), codeOf(Model.codeLines(data, graph)));
  }

  function codeOf(lines) {
    const className = { "+": "added", "-": "removed", " ": "same" };
    return el("pre", { class: "diff", tabindex: 0 }, lines.map((line) =>
      el("span", { class: `row ${className[line.sign]}`, "data-jump": line.name }, `${line.sign} ${line.text}\n`)));
  }

  return { codeOf, changesTab, missesTab, codeTab };
})();
