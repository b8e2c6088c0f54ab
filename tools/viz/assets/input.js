"use strict";
// In:  clicks, keys, the wheel, the search box, a changed address.  Out: calls to Main. Nothing is drawn here.

(() => {
  const byId = (id) => document.getElementById(id);
  const { data, state } = Main;
  const canvas = byId("graph");

  // ---- clicks: one listener for everything that leads somewhere

  function jumpTo(name) {
    Main.select(name, { center: true });
    const key = Main.visibleKey(name);
    if (key) Main.focusKey(key);
  }

  document.addEventListener("click", (event) => {
    const at = (selector) => event.target.closest?.(selector);
    if (at("[data-jump]")) jumpTo(at("[data-jump]").dataset.jump);
    else if (at("[data-step]")) Main.goStep(Number(at("[data-step]").dataset.step));
    else if (at("[data-kind]")) {
      const kind = at("[data-kind]").dataset.kind;
      Main.show({ kind: state.kind === kind ? null : kind });
    } else if (at("[data-tab]")) Main.show({ tab: at("[data-tab]").dataset.tab });
    else if (at("[data-do]")) actions[at("[data-do]").dataset.do]();
    else if (at("[data-key]") && !drag.moved) activate(at("[data-key]").dataset.key);
  });

  function activate(key) {
    if (key.startsWith("@")) Main.toggle(key.slice(1));
    else Main.select(key);
    Main.focusKey(key);
  }

  const center = () => [canvas.clientWidth / 2, canvas.clientHeight / 2];
  const actions = {
    fit: () => Main.fit(),
    "zoom-in": () => Main.zoom(1.25, ...center()),
    "zoom-out": () => Main.zoom(0.8, ...center()),
    "expand-all": () => Main.show({ open: new Set(Main.graph().groups.keys()) }, { anchor: state.selected }),
    "collapse-all": () => {
      Main.show({ open: Model.openByDefault(Main.graph()) });
      Main.fit(0.7);
    },
    before: () => Main.show({ before: !state.before }, { anchor: state.selected }),
    theme: () => Main.show({ theme: document.documentElement.dataset.theme === "dark" ? "light" : "dark" }),
    help: () => byId("help").showModal(),
    "close-help": () => byId("help").close(),
  };

  // ---- the pointer over the picture: drag pans, the wheel scrolls, the wheel with Ctrl (or a pinch) zooms

  const drag = { on: false, moved: false, x: 0, y: 0 };
  canvas.addEventListener("pointerdown", (event) => {
    Object.assign(drag, { on: event.button === 0, moved: false, x: event.clientX, y: event.clientY });
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!drag.on) return;
    const [dx, dy] = [event.clientX - drag.x, event.clientY - drag.y];
    if (!drag.moved && Math.hypot(dx, dy) < 4) return;
    if (!drag.moved) canvas.setPointerCapture(event.pointerId);
    Object.assign(drag, { moved: true, x: event.clientX, y: event.clientY });
    Main.camera.x += dx;
    Main.camera.y += dy;
    Main.move();
  });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { drag.on = false; });
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    const unit = event.deltaMode === 1 ? 16 : 1;
    if (event.ctrlKey || event.metaKey) {
      const box = canvas.getBoundingClientRect();
      Main.zoom(Math.exp(-event.deltaY * unit * 0.004), event.clientX - box.left, event.clientY - box.top);
      return;
    }
    Main.camera.x -= (event.shiftKey ? event.deltaY : event.deltaX) * unit;
    Main.camera.y -= (event.shiftKey ? 0 : event.deltaY) * unit;
    Main.move();
  }, { passive: false });

  // ---- the map, the slider, the overlays

  const map = byId("minimap");
  for (const kind of ["pointerdown", "pointermove"]) {
    map.addEventListener(kind, (event) => {
      if (event.buttons !== 1) return;
      map.setPointerCapture(event.pointerId);
      Main.lookAt(...Minimap.at(event));
      event.stopPropagation();
    });
  }
  byId("slider").max = data.steps.length - 1;
  byId("slider").addEventListener("input", () => Main.goStep(Number(byId("slider").value)));
  byId("overlay").addEventListener("change", () => Main.show({ overlay: byId("overlay").value || null }, { anchor: state.selected && Main.visibleKey(state.selected) }));

  function nextOverlay() {
    const keys = [null, ...Overlay.available(data).map((one) => one.key)];
    Main.show({ overlay: keys[(keys.indexOf(state.overlay) + 1) % keys.length] }, { anchor: state.selected && Main.visibleKey(state.selected) });
  }

  // ---- keys

  const arrows = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };

  function graphKey(event) {
    const key = event.target.dataset?.key ?? state.selected ?? null;
    if (arrows[event.key]) {
      const next = Main.neighbour(key && Main.visibleKey(key), ...arrows[event.key]);
      Main.select(next, { center: true });
      Main.focusKey(next);
    } else if ((event.key === "Enter" || event.key === " ") && key) activate(key);
    else return false;
    return true;
  }

  function tabKey(event) {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return false;
    const tabs = [...document.querySelectorAll("[role=tab]:not([hidden])")];
    const next = tabs[(tabs.indexOf(event.target) + (event.key === "ArrowRight" ? 1 : tabs.length - 1)) % tabs.length];
    Main.show({ tab: next.dataset.tab });
    next.focus();
    return true;
  }

  const shortcuts = {
    "/": () => byId("search").focus(), "[": () => Main.goStep(state.step - 1), "]": () => Main.goStep(state.step + 1),
    "+": actions["zoom-in"], "=": actions["zoom-in"], "-": actions["zoom-out"], "0": actions.fit, b: actions.before,
    e: actions["expand-all"], c: actions["collapse-all"], t: actions.theme, o: nextOverlay, "?": actions.help,
    Escape: () => Main.show({ selected: null }),
  };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
    const target = event.target;
    if (["search", "slider", "overlay"].includes(target.id)) return;
    if (canvas.contains(target) && graphKey(event)) return void event.preventDefault();
    if (target.getAttribute?.("role") === "tab" && tabKey(event)) return void event.preventDefault();
    if (!shortcuts[event.key]) return;
    shortcuts[event.key]();
    event.preventDefault();
  });

  // ---- search: words that must all occur in a node's name, operation, module, format or source line

  const SHOWN = 60;

  function matches(query) {
    const words = query.toLowerCase().split(/\s+/).filter(Boolean);
    if (words.length === 0) return [];
    const found = [];
    const has = (texts) => words.every((word) => texts.toLowerCase().includes(word));
    for (const group of Main.graph().groups.values()) {
      if (group.path && has(group.path)) found.push({ key: `@${group.path}`, text: group.path, sub: `${group.size} nodes` });
    }
    for (const node of Main.graph().nodes.values()) {
      if (has(`${node.name} ${node.target} ${node.module} ${node.format} ${node.kindText} ${node.source}`)) {
        found.push({ key: node.name, text: node.name, sub: [node.module, node.kindText, node.format].filter(Boolean).join(" · ") });
      }
    }
    // "layers.2" means layer 2 before it means layer 20.
    const whole = words.map((word) => new RegExp(`(^|[^a-z0-9])${word.replace(/[^a-z0-9]/g, "[^a-z0-9]")}($|[^a-z0-9])`));
    const rank = ({ text, sub }) => (whole.every((word) => word.test(`${text} ${sub}`.toLowerCase())) ? 0 : 1);
    return found.map((hit) => ({ ...hit, rank: rank(hit) })).sort((a, b) => a.rank - b.rank);
  }

  function search() {
    const found = matches(byId("search").value);
    const { el } = Panels;
    byId("found").replaceChildren(...found.slice(0, SHOWN).map(({ key, text, sub }, i) =>
      el("li", { role: "option", id: `hit-${i}`, "data-jump": key, "aria-selected": i === 0 ? "true" : "false" }, text, el("span", { class: "quiet" }, sub))));
    if (found.length > SHOWN) byId("found").append(el("li", { class: "quiet" }, `and ${found.length - SHOWN} more`));
    if (byId("search").value && found.length === 0) byId("found").append(el("li", { class: "quiet" }, "nothing in this stage"));
    byId("found").hidden = byId("search").value === "";
    byId("search").setAttribute("aria-expanded", String(!byId("found").hidden));
    byId("search").setAttribute("aria-activedescendant", found.length ? "hit-0" : "");
  }

  function moveHit(by) {
    const hits = [...byId("found").querySelectorAll("[role=option]")];
    if (hits.length === 0) return;
    const now = hits.findIndex((hit) => hit.getAttribute("aria-selected") === "true");
    const next = hits[(now + by + hits.length) % hits.length];
    for (const hit of hits) hit.setAttribute("aria-selected", String(hit === next));
    byId("search").setAttribute("aria-activedescendant", next.id);
    next.scrollIntoView({ block: "nearest" });
  }

  function closeSearch() {
    byId("found").hidden = true;
    byId("search").setAttribute("aria-expanded", "false");
  }

  byId("search").addEventListener("input", search);
  byId("search").addEventListener("focus", search);
  byId("search").addEventListener("blur", () => setTimeout(closeSearch, 150));
  byId("search").addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown") moveHit(1);
    else if (event.key === "ArrowUp") moveHit(-1);
    else if (event.key === "Escape") byId("search").blur();
    else if (event.key === "Enter") {
      const hit = byId("found").querySelector("[aria-selected=true]");
      if (hit) jumpTo(hit.dataset.jump);
      closeSearch();
    } else return;
    event.preventDefault();
  });

  // ---- start

  function fromHash() {
    Main.readHash();
    Main.show({}, { center: state.selected !== null });
    const key = state.selected === null ? null : Main.visibleKey(state.selected);
    if (key) Main.focusKey(key);
    else Main.fit(0.7); // nothing picked, or what another stage has
  }

  window.addEventListener("hashchange", fromHash);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => Main.show());
  document.body.classList.toggle("two", Boolean(data.other));
  byId("tab-compare").hidden = !data.other;
  byId("tab-plots").hidden = Object.keys(data.overlays.kernels ?? {}).length === 0 && !data.pareto?.length;
  byId("mirror-name").textContent = data.other ? `B  ${data.other.title}` : "";
  byId("title").textContent = data.other ? `A  ${data.title}` : data.title;
  byId("totals").textContent = data.summary;
  fromHash();
  document.body.dataset.ready = "yes";
})();
