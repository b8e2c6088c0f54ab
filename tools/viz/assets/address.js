"use strict";
// In:  the page's state (main.js), the address's hash: #step=3&node=linear_5&tab=code&theme=dark.
// Out: the state that a hash says; the hash that a state has, so that an address can be kept and sent on.

const Address = (() => {
  const TABS = ["node", "changes", "misses", "code", "plots", "compare"];

  // Parts of the state; `open` is "all", a set of paths, or null for the overview.
  function read(data) {
    const hash = new URLSearchParams(location.hash.slice(1));
    const last = data.steps.length - 1;
    const step = Number(hash.get("step") ?? last);
    const selected = hash.get("node") ?? (hash.has("module") ? `@${hash.get("module")}` : null);
    const overlay = Overlay.available(data).some((one) => one.key === hash.get("overlay")) ? hash.get("overlay") : null;
    return {
      step: Number.isInteger(step) ? Math.min(Math.max(step, 0), last) : 0,
      selected, overlay,
      tab: TABS.includes(hash.get("tab")) ? hash.get("tab") : data.other && selected === null ? "compare" : "node",
      before: hash.get("view") === "before",
      kind: hash.get("kind"),
      theme: ["light", "dark"].includes(hash.get("theme")) ? hash.get("theme") : null,
      open: hash.get("open") === "all" ? "all" : hash.has("open") ? new Set(["", ...hash.get("open").split(",")]) : null,
    };
  }

  function write(state) {
    const hash = new URLSearchParams({ step: state.step });
    if (state.selected?.startsWith("@")) hash.set("module", state.selected.slice(1));
    else if (state.selected) hash.set("node", state.selected);
    if (state.tab !== "node") hash.set("tab", state.tab);
    if (state.before) hash.set("view", "before");
    for (const key of ["kind", "overlay", "theme"]) if (state[key]) hash.set(key, state[key]);
    keep(`#${hash}`);
  }

  // Browsers refuse more than a few hundred addresses in ten seconds; of more than that the last one is written, when
  // they have come to rest.
  const kept = { times: [], timer: 0 };
  function keep(address) {
    clearTimeout(kept.timer);
    const set = () => history.replaceState(null, "", address);
    kept.times = [...kept.times.filter((at) => at > performance.now() - 10000), performance.now()].slice(-100);
    if (kept.times.length < 100) set();
    else kept.timer = setTimeout(set, 300);
  }

  return { read, write };
})();
