"use strict";
// In:  the data in the page, the address (address.js), the user's hands (input.js).
// Out: the page kept in step with its state. The state is one object; every change goes through `show`.

const Main = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const graphs = new Map();
  const state = { step: 0, selected: null, tab: "node", open: null, before: false, kind: null, theme: null, overlay: null };
  const camera = { x: 0, y: 0, k: 1 };
  let graph = null;
  let laid = null;
  let drawn = null; // what the picture shows
  let places = new Map(); // key -> {x, y, w, h} in the picture

  for (const side of [data, data.other]) {
    if (!side) continue;
    // A node may be called `constructor`: a table by names has nothing but its own entries.
    const bare = (table) => Object.assign(Object.create(null), table);
    Object.assign(side, { errors: bare(side.errors), regions: bare(side.regions) });
    for (const [key, table] of Object.entries(side.overlays)) if (table && typeof table === "object" && !Array.isArray(table)) side.overlays[key] = bare(table);
    for (const record of side.records) record.kindText = side.kinds.find((k) => k.key === record.kind).text;
    side.finalNames = new Set(side.steps[side.steps.length - 1].ids.map((id) => side.records[id].name));
  }

  function graphAt(step) {
    if (!graphs.has(step)) graphs.set(step, { ...Model.graphOf(data, step), kindOrder: data.kinds.map((kind) => kind.key) });
    return graphs.get(step);
  }

  // The other trace's graph of the stage with the same name; its last one if it has none.
  function otherAt(step) {
    const { other } = data;
    if (!other) return null;
    const name = data.steps[step].name;
    let at = other.steps.length - 1;
    other.steps.forEach((one, i) => { if (one.name === name) at = i; });
    const key = `other ${at}`;
    if (!graphs.has(key)) graphs.set(key, { ...Model.graphOf(other, at), kindOrder: other.kinds.map((kind) => kind.key) });
    return graphs.get(key);
  }

  function readHash() {
    const { open, ...rest } = Address.read(data);
    Object.assign(state, rest);
    if (open !== null) state.open = open === "all" ? new Set(graphAt(state.step).groups.keys()) : open;
  }

  // ---- drawing

  function marksOf(shown) {
    if (data.other && !state.before) return Compare.marks(shown, otherAt(state.step));
    const { diff } = graphAt(state.step);
    const marks = new Map();
    const names = state.before ? [["removed", diff.removed], ["changed", diff.changed]] : [["added", diff.added], ["changed", diff.changed]];
    for (const [mark, set] of names) for (const name of set) if (shown.nodes.has(name)) marks.set(name, mark);
    return marks;
  }

  function show(change = {}, { anchor = null, center = false } = {}) {
    Object.assign(state, { theme: change.theme ?? state.theme });
    const theme = state.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
    if (document.documentElement.dataset.theme !== theme) {
      document.documentElement.dataset.theme = theme;
      Minimap.theme();
      drawn = null;
    }
    const pinned = anchor && places.get(anchor);
    // What is opened or closed keeps the middle of its upper edge where it was.
    const top = ({ x, y, w }) => ({ x: (x + w / 2) * camera.k, y: y * camera.k });
    const at = pinned ? { x: top(pinned).x + camera.x, y: top(pinned).y + camera.y } : null;
    Object.assign(state, change);
    if (state.step === 0) state.before = false;
    graph = graphAt(state.before ? state.step - 1 : state.step);
    state.open ??= Model.openByDefault(graph);
    const name = state.selected;
    if (name && center) for (const path of Model.pathsAbove(graph, name)) state.open.add(path);
    if (name?.startsWith("@") && center) openTo(name.slice(1));
    // Drawing is the dear part: it is done for another stage or other open boxes, not for another selection.
    const wanted = `${state.step} ${state.before} ${state.overlay} ${[...state.open].sort().join("\n")}`;
    if (wanted !== drawn) draw();
    drawn = wanted;
    drawMarks();
    drawPanels();
    if (at && places.has(anchor)) {
      camera.x = at.x - top(places.get(anchor)).x;
      camera.y = at.y - top(places.get(anchor)).y;
    }
    if (center && state.selected) centerOn(visibleKey(state.selected));
    move();
    Address.write(state);
  }

  function draw() {
    graph.marks = marksOf(graph);
    graph.paint = state.overlay ? Overlay.paint(data, graph, state.overlay, data.other ? [data.other, otherAt(state.step)] : null) : null;
    laid = Layout.layout(graph.root, state.open, graph);
    const world = byId("world");
    world.replaceChildren(Draw.arrow(), Draw.picture(laid, graph, state.open));
    world.setAttribute("width", laid.w);
    world.setAttribute("height", laid.h);
    places = new Map();
    findPlaces(laid, 0, 0);
    if (data.other) drawMirror();
    Minimap.draw(laid, places, graph);
  }

  // The other trace beside it, with the same modules open.
  function drawMirror() {
    const other = otherAt(state.step);
    other.marks = Compare.marks(other, graphAt(state.step));
    other.paint = state.overlay ? Overlay.paint(data.other, other, state.overlay, [data, graphAt(state.step)]) : null;
    const pictured = Layout.layout(other.root, state.open, other);
    byId("mirror-world").replaceChildren(Draw.picture(pictured, other, state.open));
    byId("mirror-world").setAttribute("width", pictured.w);
    byId("mirror-world").setAttribute("height", pictured.h);
  }

  function openTo(path) {
    let found = path;
    while (found && !graph.groups.has(found)) found = found.slice(0, Math.max(0, found.lastIndexOf(".")));
    for (let group = graph.groups.get(found)?.parent; group; group = group.parent) state.open.add(group.path);
  }

  function findPlaces(picture, dx, dy) {
    for (const placed of picture.items) {
      places.set(Model.keyOf(placed.item), { x: placed.x + dx, y: placed.y + dy, w: placed.w, h: placed.h });
      if (placed.inner) findPlaces(placed.inner, placed.x + dx, placed.y + dy);
    }
  }

  // The node's own box, or the closed box that hides it.
  function visibleKey(key) {
    if (places.has(key)) return key;
    const paths = key.startsWith("@") ? [key.slice(1)] : Model.pathsAbove(graph, key);
    for (let path of paths.reverse()) {
      while (path && !places.has(`@${path}`)) path = path.slice(0, Math.max(0, path.lastIndexOf(".")));
      if (path) return `@${path}`;
    }
    return null;
  }

  function drawMarks() {
    const world = byId("world");
    const key = state.selected && visibleKey(state.selected);
    for (const old of world.querySelectorAll(".selected, .near, [tabindex='0']")) {
      old.classList.remove("selected", "near");
      if (old.dataset.key) old.setAttribute("tabindex", -1);
    }
    const box = key ? world.querySelector(`[data-key="${CSS.escape(key)}"]`) : null;
    box?.classList.add("selected");
    (box ?? world.querySelector("[data-key]"))?.setAttribute("tabindex", 0);
    if (box) {
      const at = CSS.escape(key);
      for (const edge of world.querySelectorAll(`[data-from="${at}"], [data-to="${at}"]`)) edge.classList.add("near");
    }
    world.setAttribute("class", state.kind ? `only-${state.kind}` : "");
  }

  function drawPanels() {
    const now = graphAt(state.step);
    byId("stages").replaceChildren(...Panels.stages(data, data.steps.map((_, i) => diffAt(i)), state.step));
    byId("legend").replaceChildren(...Panels.legend(data, graph, state.kind));
    byId("legend").hidden = graph.paint !== null;
    byId("scale").replaceChildren(...(graph.paint ? Panels.scale(graph.paint.legend) : []));
    byId("overlay").replaceChildren(...Panels.overlays(data, state.overlay));
    byId("slider").value = state.step;
    byId("slider").setAttribute("aria-valuetext", `${state.step} ${now.step.name}`);
    byId("before").setAttribute("aria-pressed", String(state.before));
    byId("before").disabled = state.step === 0;
    for (const tab of document.querySelectorAll("[role=tab]")) {
      const mine = tab.dataset.tab === state.tab;
      tab.setAttribute("aria-selected", String(mine));
      tab.setAttribute("tabindex", mine ? 0 : -1);
    }
    byId("miss-count").textContent = now.misses.size ? ` ${now.misses.size}` : "";
    byId("panel").replaceChildren(tabContent(now));
    byId("panel").setAttribute("aria-labelledby", `tab-${state.tab}`);
    byId("where").textContent = state.before ? `before ${now.step.name}` : `after ${now.step.name}`;
  }

  const diffAt = (i) => graphAt(i).diff;

  function tabContent(now) {
    if (state.tab === "changes") return Changes.changesTab(data, now);
    if (state.tab === "misses") return Changes.missesTab(now);
    if (state.tab === "code") return Changes.codeTab(data, now);
    if (state.tab === "plots") return Details.plotsTab(data);
    if (state.tab === "compare") return data.other ? Compare.tab(data, now, otherAt(state.step)) : Panels.el("p", { class: "quiet" }, "This page holds one trace.");
    if (state.selected === null) return Panels.groupTab(data, graph, "");
    if (state.selected.startsWith("@")) return Panels.groupTab(data, graph, state.selected.slice(1));
    const shown = Panels.nodeTab(data, graph, state.selected);
    if (data.other) shown.append(Compare.twinSection(data, otherAt(state.step), state.selected));
    return shown;
  }

  // ---- the camera

  // The picture is a layer of its own, painted once and then only moved: three times as many frames with 5,000 boxes
  // in sight. Painted for one size, its letters are soft at another, so it is painted again once a zoom has come to rest.
  const FAR = 0.22; // below this letters are no letters any more, and are left out
  let painted = 0;
  let resting = 0;

  function repaint() {
    clearTimeout(resting);
    resting = setTimeout(() => {
      painted = camera.k;
      byId("world").style.willChange = "auto";
      requestAnimationFrame(() => { byId("world").style.willChange = "transform"; });
    }, 200);
  }

  function move() {
    // A transform of the whole element costs no layout; one inside the SVG would lay out every text again.
    if (camera.k !== painted) repaint();
    byId("graph").classList.toggle("far", camera.k < FAR);
    byId("world").style.transform = `translate(${camera.x}px,${camera.y}px) scale(${camera.k})`;
    byId("mirror-world").style.transform = byId("world").style.transform;
    Minimap.frame(camera, byId("graph").getBoundingClientRect());
    byId("zoom").textContent = `${Math.round(100 * camera.k)}%`;
  }

  function zoom(factor, cx, cy) {
    const k = Math.min(3, Math.max(0.02, camera.k * factor));
    camera.x = cx - ((cx - camera.x) * k) / camera.k;
    camera.y = cy - ((cy - camera.y) * k) / camera.k;
    camera.k = k;
    move();
  }

  function centerOn(key) {
    const place = places.get(key);
    if (!place) return;
    const { width, height } = byId("graph").getBoundingClientRect();
    if (camera.k < 0.6) camera.k = 1;
    camera.x = width / 2 - (place.x + place.w / 2) * camera.k;
    camera.y = height / 2 - (place.y + Math.min(place.h, 200) / 2) * camera.k;
  }

  // The whole picture, or as much of it from the top as is still readable.
  function fit(least = 0.02) {
    const { width, height } = byId("graph").getBoundingClientRect();
    const all = Math.min((width - 24) / laid.w, (height - 24) / laid.h);
    camera.k = Math.min(1.2, Math.max(all, Math.min(least, (width - 24) / laid.w), 0.02));
    camera.x = (width - laid.w * camera.k) / 2;
    camera.y = Math.max(data.other ? 44 : 12, (height - laid.h * camera.k) / 2);
    move();
  }

  // ---- what a person does

  function select(key, options) {
    show({ selected: key, tab: "node" }, options);
  }

  function toggle(path) {
    const open = new Set(state.open);
    if (!open.delete(path)) open.add(path);
    show({ open, selected: `@${path}`, tab: "node" }, { anchor: `@${path}` });
  }

  function focusKey(key) {
    byId("world").querySelector(`[data-key="${CSS.escape(key)}"]`)?.focus({ preventScroll: true });
  }

  function goStep(step) {
    show({ step: Math.min(Math.max(step, 0), data.steps.length - 1) }, { anchor: state.selected && visibleKey(state.selected) });
  }

  // The nearest box in the arrow's direction.
  function neighbour(key, dx, dy) {
    const here = places.get(key);
    if (!here) return [...places.keys()][0];
    const [hx, hy] = [here.x + here.w / 2, here.y + 12];
    let best = null;
    for (const [other, place] of places) {
      const [vx, vy] = [place.x + place.w / 2 - hx, place.y + 12 - hy];
      const along = vx * dx + vy * dy;
      if (other === key || along < 6) continue;
      const cost = along + 2.5 * Math.abs(vx * dy + vy * dx);
      if (!best || cost < best.cost) best = { other, cost };
    }
    return best?.other ?? key;
  }

  // The window's middle comes to a point of the picture.
  function lookAt(x, y) {
    const { width, height } = byId("graph").getBoundingClientRect();
    camera.x = width / 2 - x * camera.k;
    camera.y = height / 2 - y * camera.k;
    move();
  }

  return { data, state, lookAt, camera, show, select, toggle, goStep, fit, zoom, move, neighbour, focusKey, visibleKey, readHash, graph: () => graph, graphAt, places: () => places };
})();
