"""The script of the report: the viewer. It asks nothing of the network and stores nothing."""

SCRIPT = r"""
"use strict";
(() => {
  const element = (id) => document.getElementById(id);
  const data = JSON.parse(element("viewer-data").textContent);
  const [chooser, slider, place, masks, state] = ["case", "slice", "place", "masks", "state"].map(
    (name) => element("viewer-" + name));
  const panels = [...document.querySelectorAll(".panel")].map((box) => ({
    box, image: box.querySelector("img"), canvas: box.querySelector("canvas"),
    name: box.querySelector("figcaption").textContent,
  }));
  const abouts = [...document.querySelectorAll(".about-case")];
  const contrast = element("viewer-contrast");
  let shown = null;   // the case, its label maps unpacked
  let asked = 0;      // cases may be chosen faster than they are unpacked

  async function unpack(packed) {
    const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
    const plain = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(plain).arrayBuffer());
  }

  async function show(number) {
    const turn = ++asked;
    const chosen = data.cases[number];
    const maps = await Promise.all(
      panels.map((_, i) => chosen.maps[i] === null ? null : unpack(chosen.maps[i])));
    if (turn !== asked) return;
    shown = {...chosen, maps, number};
    panels.forEach(({box}, i) => {
      box.hidden = maps[i] === null;
      box.querySelector("div").style.aspectRatio = chosen.aspect;
    });
    abouts.forEach((about, i) => { about.hidden = i !== number; });
    slider.max = chosen.images.length - 1;
    slider.value = chosen.start;
    slider.disabled = false;
    draw();
  }

  // What of the map is coloured: classes, or where it differs from the truth (1 missed, 2 added,
  // 3 another class).
  function coloured(map, truth, wanted) {
    const result = new Uint8Array(map.length);
    for (let i = 0; i < map.length; i++) {
      const here = wanted[map[i]] ? map[i] : 0;
      if (truth === null) { result[i] = here; continue; }
      const there = wanted[truth[i]] ? truth[i] : 0;
      if (here !== there) result[i] = here === 0 ? 1 : there === 0 ? 2 : 3;
    }
    return result;
  }

  // A faint fill and, along the inner side of every boundary, a line; of classes beyond the
  // palette's length the line is dashed.
  function paint(canvas, map, width, height, colours) {
    const scale = Math.max(1, Math.round(512 / Math.max(width, height)));
    const line = Math.min(3, scale);
    canvas.width = width * scale;
    canvas.height = height * scale;
    const context = canvas.getContext("2d");
    const outlines = new Map();
    context.globalAlpha = 0.3;
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        const at = y * width + x, label = map[at];
        if (label === 0) continue;
        const left = x * scale, top = y * scale;
        context.fillStyle = colours[(label - 1) % colours.length];
        context.fillRect(left, top, scale, scale);
        if (label > colours.length && (x + y) % 3 === 0) continue;
        if (!outlines.has(label)) outlines.set(label, new Path2D());
        const outline = outlines.get(label);
        if (x === 0 || map[at - 1] !== label) outline.rect(left, top, line, scale);
        if (y === 0 || map[at - width] !== label) outline.rect(left, top, scale, line);
        if (x === width - 1 || map[at + 1] !== label)
          outline.rect(left + scale - line, top, line, scale);
        if (y === height - 1 || map[at + width] !== label)
          outline.rect(left, top + scale - line, scale, line);
      }
    }
    context.globalAlpha = 1;
    for (const [label, outline] of outlines) {
      context.fillStyle = colours[(label - 1) % colours.length];
      context.fill(outline);
    }
  }

  function draw() {
    if (shown === null) return;
    const at = Number(slider.value);
    const {width, height, classes} = shown;
    const words = `slice ${shown.positions[at] + 1} of ${shown.slices}`;
    const difference = element("viewer-difference").checked;
    const ticked = abouts[shown.number].querySelectorAll("input");
    const wanted = classes.map(() => true);
    ticked.forEach((box) => { wanted[Number(box.value)] = box.checked; });
    const part = (map) => map.subarray(at * width * height, (at + 1) * width * height);
    panels.forEach(({image, canvas, name}, i) => {
      if (shown.maps[i] === null) return;
      image.src = "data:image/webp;base64," + shown.images[at];
      canvas.hidden = !masks.checked;
      const compared = difference && i > 0;
      const map = coloured(part(shown.maps[i]), compared ? part(shown.maps[0]) : null, wanted);
      paint(canvas, map, width, height, compared ? data.differences : data.colours);
      const found = [...new Set(map)].filter((label) => label > 0).sort((a, b) => a - b);
      const names = found.map((label) => compared ? data.kinds[label - 1] : classes[label]);
      canvas.setAttribute("aria-label", `${name}${compared ? ", difference to the truth" : ""}, ` +
        `${shown.name}, ${words}: ${names.join(", ") || "nothing"}`);
    });
    contrast.hidden = !difference;
    place.textContent = words;
    slider.setAttribute("aria-valuetext", words);
  }

  function choose() {
    show(Number(chooser.value)).catch((error) => {
      state.textContent = "This browser cannot unpack the label maps: " + error.message;
    });
  }

  slider.addEventListener("input", draw);
  chooser.addEventListener("change", choose);
  element("viewer").addEventListener("change", (event) => {
    if (event.target !== chooser && event.target !== slider) draw();
  });
  choose();
})();
"""
