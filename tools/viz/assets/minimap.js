"use strict";
// In:  where the boxes lie (main.js's places), the camera, the window's size.
// Out: a small map of the whole picture, what a pass changed in colour, with the window's frame in it.

const Minimap = (() => {
  const canvas = document.getElementById("minimap");
  const base = document.createElement("canvas");
  let scale = 1;
  let size = [0, 0];

  const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // Once for every picture. Colours that mean something first: missed, added, changed, then the kind's.
  function draw(laid, places, graph) {
    const [most, ratio] = [{ w: 150, h: 190 }, devicePixelRatio || 1];
    scale = Math.min(most.w / laid.w, most.h / laid.h);
    size = [Math.max(24, laid.w * scale), Math.max(16, laid.h * scale)];
    for (const one of [canvas, base]) Object.assign(one, { width: size[0] * ratio, height: size[1] * ratio });
    Object.assign(canvas.style, { width: `${size[0]}px`, height: `${size[1]}px` });
    const pen = base.getContext("2d");
    pen.setTransform(ratio * scale, 0, 0, ratio * scale, 0, 0);
    const colours = new Map();
    const colour = (name) => {
      if (!colours.has(name)) colours.set(name, variable(`--${name}`));
      return colours.get(name);
    };
    for (const [key, place] of places) {
      const group = key.startsWith("@") ? graph.groups.get(key.slice(1)) : null;
      const node = group ? null : graph.nodes.get(key);
      const h = Math.max(place.h, 1.2 / scale);
      if (group) {
        pen.fillStyle = colour("line");
        pen.globalAlpha = 0.35;
      } else {
        pen.fillStyle = colour(graph.misses.has(key) ? "missed" : graph.marks.get(key) ?? node?.kind ?? "untouched");
        pen.globalAlpha = 1;
      }
      pen.fillRect(place.x, place.y, place.w, h);
      if (group?.missed || group?.added || group?.changed) {
        pen.globalAlpha = 1;
        pen.fillStyle = colour(group.missed ? "missed" : group.added ? "added" : "changed");
        pen.fillRect(place.x, place.y, Math.max(16, 2 / scale), h);
      }
    }
    pen.globalAlpha = 1;
  }

  // On every move: the map again, and the frame.
  function frame(camera, { width, height }) {
    const ratio = devicePixelRatio || 1;
    const pen = canvas.getContext("2d");
    pen.setTransform(1, 0, 0, 1, 0, 0);
    pen.clearRect(0, 0, canvas.width, canvas.height);
    pen.drawImage(base, 0, 0);
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.strokeStyle = canvas.dataset.frame ?? "#888";
    pen.lineWidth = 1.5;
    const s = scale / camera.k;
    pen.strokeRect(-camera.x * s, -camera.y * s, width * s, height * s);
  }

  function theme() {
    canvas.dataset.frame = variable("--accent");
  }

  // A point of the map as a point of the picture.
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) / scale, (event.clientY - box.top) / scale];
  };

  return { draw, frame, theme, at };
})();
