"use strict";
// In:  the data, the name of a node or of a weight.
// Out: what an inspection knows of it: the generated kernel with its source and roof, work, histograms, outliers.

const Details = (() => {
  const el = (...given) => Panels.el(...given);
  const row = (term, value) => (value === null || value === undefined || value === "" ? [] : [el("dt", {}, term), el("dd", {}, value)]);

  // ---- work

  function workRows(data, name) {
    const done = data.overlays.work?.[name] ?? data.overlays.baseline?.[name];
    if (!done) return [];
    const [flops, moved, us] = done;
    const total = Object.entries(data.overlays.work ?? {}).filter(([n]) => data.finalNames.has(n)).reduce((a, [, w]) => a + (w[2] ?? 0), 0);
    const share = us && total && data.overlays.work?.[name] ? `, ${Number(((100 * us) / total).toPrecision(2))}% of all` : "";
    return [
      ...row("operations", flops ? `${Overlay.engineering(flops)}FLOP` : null),
      ...row("bytes moved", moved ? Panels.bytes(moved) : null),
      ...row("measured", us ? `${Overlay.micro(us)}${share}` : null),
    ];
  }

  // ---- kernels: of a node of the last step, or of the region that became one

  const kernelNames = (data, name) => (data.overlays.kernels?.[name] ? [name] : data.overlays.kernels_of?.[name] ?? []);

  function kernelSection(data, name) {
    return kernelNames(data, name).map((found) => {
      const kernel = data.overlays.kernels[found];
      const us = data.overlays.work?.[found]?.[2];
      const reached = us && kernel.roof_us ? `, ${((100 * kernel.roof_us) / us).toFixed(0)}% of it reached` : "";
      const text = kernel.source === null ? null : data.overlays.sources[kernel.source];
      return el("section", { class: "kernel" },
        el("h2", {}, `The kernel${found === name ? "" : `: ${found}`}`),
        el("dl", {}, row("kernel", el("code", {}, kernel.spec)), row("language", kernel.language), row("schedule", kernel.schedule ? el("code", {}, kernel.schedule) : null),
          Object.entries(kernel.facts).map(([term, value]) => row(term, String(value))).flat(),
          found === name ? [] : workRows(data, found),
          row("roofline", kernel.roof_us ? `${Overlay.micro(kernel.roof_us)}, by ${kernel.bound}${reached}` : null),
          row("", kernel.note ? el("span", { class: "quiet" }, kernel.note) : null)),
        text ? el("details", { open: text.length < 20000 ? "" : null }, el("summary", {}, `Generated source, ${text.split("\n").length} lines`), el("pre", { class: "source", tabindex: 0 }, text)) : null);
    });
  }

  // ---- tensors

  function listed(pairs, what) {
    return pairs.map(([index, ratio]) => `${what} ${index}: ${ratio.toFixed(1)}×`).join(", ");
  }

  function weightSection(data, target) {
    const stats = data.overlays.weights?.[target];
    if (!stats) return null;
    const used = stats.codes.filter(([, n]) => n > 0).length;
    return el("section", { class: "tensor" },
      el("h2", {}, `The weight, ${stats.format} [${stats.shape.join(", ")}]`),
      el("dl", {}, row("signal to noise", stats.sqnr_db === undefined ? null : `${stats.sqnr_db.toFixed(1)} dB`), row("codes used", `${used} of ${stats.codes.length}`),
        row("rows that stand out", stats.rows.length ? listed(stats.rows, "row") : null),
        row("largest to middle row", `${stats.spread.toFixed(1)}×`)),
      el("p", { class: "quiet" }, "Values"), Charts.histogram(stats.values, "values"),
      el("p", { class: "quiet" }, "Codes used"), Charts.codes(stats.codes, "codes used"),
      stats.scales ? [el("p", { class: "quiet" }, "Scales, as powers of 2"), Charts.histogram(stats.scales, "scales")] : null);
  }

  function flowSection(data, name) {
    const flow = data.overlays.flows?.[name];
    if (!flow) return null;
    return el("section", { class: "tensor" },
      el("h2", {}, flow.codes ? `What it reads, and the codes of ${flow.format}` : "Its values on the given input"),
      el("dl", {}, row("beyond the codes", flow.codes ? `${(100 * flow.clipped).toFixed(2)}% of values` : null),
        row("channels that stand out", flow.channels ? listed(flow.channels, "channel") : null)),
      Charts.histogram(flow.values, "values"),
      flow.codes ? [el("p", { class: "quiet" }, "Codes used"), Charts.codes(flow.codes, "codes used")] : null);
  }

  // ---- the roofline of all kernels

  function plotsTab(data) {
    const recipes = data.pareto?.length ? [el("h2", {}, "Recipes against each other"), paretoPlot(data.pareto), el("p", { class: "quiet" }, "Up and to the left is better; the line joins those that no other beats.")] : [];
    return el("div", {}, recipes, roofline(data));
  }

  function roofline(data) {
    const { roof, kernels, work } = data.overlays;
    const points = Object.entries(kernels ?? {}).map(([name, kernel]) => ({ name, kernel, w: work[name] })).filter(({ w }) => w?.[0] && w[1] && w[2]).map(({ name, kernel, w: [flops, moved, us] }) => ({
      x: flops / moved, y: flops / us / 1e3, jump: name,
      text: `${name}\n${kernel.spec}\n${Overlay.micro(us)}, roof ${Overlay.micro(kernel.roof_us)} (${kernel.bound})`,
    }));
    if (!roof || points.length === 0) return el("p", { class: "quiet" }, "No kernel of this trace was timed: give bf.viz an inspection, or `bitfold viz MODEL --recipe R` on the device itself.");
    const ridge = roof.flops / roof.read;
    const [low, high] = [Math.min(...points.map((p) => p.x), ridge) / 3, Math.max(...points.map((p) => p.x), ridge) * 3];
    const at = (x) => ({ x, y: Math.min(roof.flops, roof.read * x) / 1e9 });
    const shares = points.map((p) => p.y / at(p.x).y).sort((a, b) => a - b);
    return el("div", {}, el("h2", {}, `Every kernel under the roof of ${roof.name}`),
      Charts.scatter({ points, lines: [[at(low), at(ridge), at(high)]], x: "operations for each byte", y: "GFLOP/s", log: true, label: "roofline" }),
      el("dl", {}, row("memory", `${(roof.read / 1e9).toFixed(1)} GB/s`), row("products", `${Overlay.engineering(roof.flops)}FLOP/s`),
        row("kernels", String(points.length)), row("of the roof, middle", `${(100 * shares[shares.length >> 1]).toFixed(0)}%`)),
      el("p", { class: "quiet" }, "A point leads to its node. A processor's roof was measured when the page was made; what its caches hold may lie above."));
  }

  function paretoPlot(points) {
    return Charts.scatter({ points: points.map((p) => ({ x: p.bits, y: p.sqnr_db, name: p.recipe, text: `${p.recipe}: ${p.bits.toFixed(2)} bits, ${p.sqnr_db.toFixed(1)} dB, ${p.seconds === null ? "not timed" : Overlay.micro(p.seconds * 1e6)}`, colour: p.front ? "var(--accent)" : "var(--edge)" })), lines: [points.filter((p) => p.front).map((p) => ({ x: p.bits, y: p.sqnr_db }))], x: "bits for each weight", y: "signal to noise, dB", label: "Pareto plot of recipes" });
  }

  return { workRows, kernelSection, weightSection, flowSection, plotsTab };
})();
