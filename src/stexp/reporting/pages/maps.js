// ---- maps: two views of one place -----------------------------------------------------------------------------------

const SIDES = ["left", "right"], RING = 26;
const SHOWN = { observed: "Observed", predicted: "Predicted", uncertainty: "Uncertainty", interval: "Width of the interval", image: "H&E alone" };
// viridis, between anchors: it reads the same to the colour-blind, and in grey
const ANCHORS = ["440154", "482475", "414487", "355f8d", "2a788e", "21918c", "22a884", "44bf70", "7ad151", "bddf26", "fde725"]
  .map(hex => [0, 2, 4].map(at => parseInt(hex.slice(at, at + 2), 16)));
const COLOURS = Array.from({ length: 256 }, (_, i) => {
  const at = i / 255 * (ANCHORS.length - 1), left = Math.min(Math.floor(at), ANCHORS.length - 2);
  return `rgb(${ANCHORS[left].map((c, k) => Math.round(c + (at - left) * (ANCHORS[left + 1][k] - c)))})`;
});
const state = { section: null, gene: 0, shown: {}, limits: {}, view: { x: 0, y: 0, zoom: 1 }, hover: -1, chosen: -1, pending: false };
const showsOf = side => $(`${side}-shows`).value;

function limitsOf(...layers) {
  const values = Float32Array.from(layers.flatMap(layer => [...layer]).filter(v => !Number.isNaN(v))).sort();
  if (!values.length) return null;
  const low = values[0], high = values[Math.floor(0.99 * (values.length - 1))], most = values[values.length - 1];
  return { low, high: high > low ? high : most, clipped: high > low && high < most };
}

const layersShown = () => SIDES.map(showsOf).filter(layer => layer !== "image");

async function scaleOf(layer) {
  const how = $("scale").value, { gene, shown } = state;
  if (how === "fixed") {
    const low = $("from").valueAsNumber, high = $("to").valueAsNumber;
    return high > low ? { low, high, clipped: true } : limitsOf(shown[layer]);
  }
  // uncertainty is not on the scale of expression
  const alike = ["observed", "predicted"].includes(layer) ? layersShown().filter(other => ["observed", "predicted"].includes(other)) : [layer];
  if (how === "same") return limitsOf(...alike.map(other => shown[other]));
  if (how === "all") {
    const all = await Promise.all(page.sections.map((_, i) => sectionData(i)));
    return limitsOf(...all.flatMap(own => alike.map(other => geneValues(own, other, gene))));
  }
  return limitsOf(shown[layer]);
}

async function choose() {
  const { section, gene } = state, name = page.genes[gene];
  for (const layer of section.layers) state.shown[layer] = geneValues(section, layer, gene);
  const limits = Object.fromEntries(await Promise.all(layersShown().map(async layer => [layer, await scaleOf(layer)])));
  if (gene !== state.gene || section !== state.section) return; // another choice came in between
  state.limits = limits;
  state.most = section.layers.includes("uncertainty") ? limitsOf(state.shown.uncertainty)?.high : undefined;
  for (const side of SIDES) {
    const layer = showsOf(side), at = limits[layer], own = layer === "image" ? null : limitsOf(state.shown[layer]);
    $(`${side}-low`).textContent = at && own ? fixed(at.low, 2) : "";
    $(`${side}-high`).textContent = at && own ? (at.clipped ? "≥ " : "") + fixed(at.high, 2) : "";
    $(`${side}-low`).parentElement.style.visibility = at && own ? "visible" : "hidden";
    const notice = layer === "image" ? "" : !own ? `no ${layer} values of ${name} in section ${section.name}`
      : own.low === own.high ? `${layer} ${name} is ${fixed(own.low, 2)} in every spot` : "";
    $(`${side}-notice`).textContent = notice;
    $(`${side}-notice`).hidden = !notice;
  }
  aboutGene();
  for (const line of document.querySelectorAll("#table tbody tr")) line.ariaCurrent = line.dataset.gene === name ? "true" : null;
  fillSpot();
  redraw();
}

function aboutGene() {
  const { section, gene } = state, name = page.genes[gene], row = page.table.rows.find(own => own.gene === name) ?? {};
  $("gene").value = name;
  const of = page.parts ? `${name}, ${section.name}` : `${name} in section ${section.name}`;
  $("about-gene").textContent = page.parts && !(section.pearson[gene] >= -1) ? `${of}: nothing is measured there to score it by`
    : section.pearson
    ? `${of}: Pearson ${fixed(section.pearson[gene])}${page.sections.length > 1 && !page.parts ? `; mean over sections ${fixed(row.pearson)}` : ""}, ceiling ${fixed(row.ceiling)}`
    : `${name}: Pearson to expect ${fixed(row.expected_pearson)}, best floor ${fixed(row.expected_floor)}`
      + (row.expected_pearson === null ? " (never measured on a held-out section)" : row.beats_floor !== 0 ? "" : ": no better than its floor");
}

function redraw() {
  if (state.pending) return;
  state.pending = true;
  requestAnimationFrame(() => { state.pending = false; SIDES.forEach(paint); paintScatter(); paintSpot(); });
}

function paint(side) {
  const { section, view } = state, canvas = section && penOf($(side));
  if (!canvas) return;
  const { pen, width, height, ratio } = canvas, layer = showsOf(side);
  const left = width / 2 - view.x * view.zoom, top = height / 2 - view.y * view.zoom;
  drawSlide(pen, section, left, top, view.zoom, width, height, ratio, redraw);
  const radius = Math.max(section.spot_px * view.zoom / 2, 1.2), at = state.limits[layer], values = state.shown[layer];
  const opacity = $("opacity").value / 100, spread = layer !== "observed" && $("fade")?.checked && state.most > 0 ? state.shown.uncertainty : null;
  const missing = ink("zero");
  for (let i = 0; layer !== "image" && values && i < values.length; i++) {
    const x = left + section.xy[2 * i] * view.zoom, y = top + section.xy[2 * i + 1] * view.zoom;
    if (x < -radius || y < -radius || x > width + radius || y > height + radius) continue;
    pen.globalAlpha = spread && !Number.isNaN(spread[i]) ? opacity * (1 - 0.92 * Math.min(spread[i] / state.most, 1)) : opacity;
    if (page.parts && Number.isNaN(values[i])) continue;
    pen.beginPath();
    if (section.square) pen.rect(x - radius, y - radius, 2 * radius, 2 * radius);
    else pen.arc(x, y, radius, 0, 2 * Math.PI);
    if (Number.isNaN(values[i]) || !at) { pen.strokeStyle = missing; pen.lineWidth = 1; pen.stroke(); continue; }
    const share = at.high > at.low ? (values[i] - at.low) / (at.high - at.low) : 0;
    pen.fillStyle = pen.strokeStyle = COLOURS[Math.round(255 * Math.min(Math.max(share, 0), 1))];
    if (radius < RING || section.square) { pen.fill(); continue; }
    // near by, the tissue is what one looks at: a ring, and little within
    pen.lineWidth = Math.min(0.2 * radius, 14);
    pen.beginPath(); pen.arc(x, y, radius - pen.lineWidth / 2, 0, 2 * Math.PI); pen.stroke();
    pen.globalAlpha *= 0.15;
    pen.fill();
  }
  pen.globalAlpha = 1;
  for (const [spot, colour] of [[state.chosen, "#d4267d"], [state.hover, "#111"]]) {
    if (spot < 0) continue;
    pen.beginPath();
    pen.arc(left + section.xy[2 * spot] * view.zoom, top + section.xy[2 * spot + 1] * view.zoom, Math.max(radius, 4) + 2, 0, 2 * Math.PI);
    pen.strokeStyle = "#fff"; pen.lineWidth = 5; pen.stroke();
    pen.strokeStyle = colour; pen.lineWidth = 2.2; pen.stroke();
  }
}

function wholeSection() {
  const { xy, spot_px } = state.section, canvas = $("left");
  let [x0, y0, x1, y1] = [Infinity, Infinity, -Infinity, -Infinity];
  for (let i = 0; i < xy.length; i += 2) {
    x0 = Math.min(x0, xy[i]); x1 = Math.max(x1, xy[i]); y0 = Math.min(y0, xy[i + 1]); y1 = Math.max(y1, xy[i + 1]);
  }
  const zoom = 0.94 * Math.min(canvas.clientWidth / (x1 - x0 + 2 * spot_px), canvas.clientHeight / (y1 - y0 + 2 * spot_px));
  state.view = { x: (x0 + x1) / 2, y: (y0 + y1) / 2, zoom, least: zoom / 4, most: Math.max(zoom * 40, 2) };
  redraw();
}

// (x, y): the point that stays where it is, in px from the middle of the map
function zoomBy(factor, x = 0, y = 0) {
  const { view } = state, zoom = Math.min(Math.max(view.zoom * factor, view.least), view.most);
  state.view = { ...view, zoom, x: view.x + x / view.zoom - x / zoom, y: view.y + y / view.zoom - y / zoom };
  redraw();
}

function moveBy(x, y) {
  state.view.x -= x / state.view.zoom;
  state.view.y -= y / state.view.zoom;
  redraw();
}

// Spot nearest to a place of the slide; -1 where none is within `reach`, in level-0 px.
function spotAt(x, y, reach) {
  const { xy, spots } = state.section;
  let nearest = -1, least = reach ** 2;
  for (let i = 0; i < spots.length; i++) {
    const away = (xy[2 * i] - x) ** 2 + (xy[2 * i + 1] - y) ** 2;
    if (away < least) { least = away; nearest = i; }
  }
  return nearest;
}

function fromMiddle(event) {
  const box = event.target.getBoundingClientRect();
  return [event.clientX - box.left - box.width / 2, event.clientY - box.top - box.height / 2];
}

function spotUnder(event) {
  const { section, view } = state, [x, y] = fromMiddle(event);
  return spotAt(x / view.zoom + view.x, y / view.zoom + view.y, Math.max(section.spot_px, 8 / view.zoom));
}

function point(event) {
  const { section, gene } = state, tip = $("tip"), frame = document.querySelector(".maps").getBoundingClientRect();
  const nearest = state.hover = spotUnder(event);
  tip.hidden = nearest < 0;
  if (nearest >= 0) {
    const at = layer => valueAt(section, layer, gene, nearest), spread = at("uncertainty");
    tip.textContent = [`spot ${section.spots[nearest]}`, ...(section.pearson ? [`observed ${fixed(at("observed"), 2)}`] : []),
      `predicted ${fixed(at("predicted"), 2)}${Number.isNaN(spread) ? "" : ` ± ${fixed(spread, 2)}`}`,
      ...(section.source ? [`mostly from ${section.source[nearest]}`] : [])].join("\n");
    const right = event.clientX - frame.left + 16;
    tip.style.left = `${Math.max(0, right + tip.offsetWidth < frame.width ? right : right - tip.offsetWidth - 32)}px`;
    tip.style.top = `${event.clientY - frame.top + 12}px`;
  }
  redraw();
}

function leave() { state.hover = -1; $("tip").hidden = true; redraw(); }

const KEYS = { "+": () => zoomBy(1.3), "=": () => zoomBy(1.3), "-": () => zoomBy(1 / 1.3), "0": wholeSection, ArrowLeft: () => moveBy(40, 0),
  ArrowRight: () => moveBy(-40, 0), ArrowUp: () => moveBy(0, 40), ArrowDown: () => moveBy(0, -40), Enter: chooseMiddle, Escape: () => chooseSpot(-1) };
const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function chooseMiddle() { chooseSpot(spotAt(state.view.x, state.view.y, Infinity)); }

// The next spot from the chosen one, in a direction
function step([dx, dy]) {
  const { section: { xy, spots }, chosen } = state;
  if (chosen < 0) return chooseMiddle();
  let next = -1, least = Infinity;
  for (let i = 0; i < spots.length; i++) {
    const x = xy[2 * i] - xy[2 * chosen], y = xy[2 * i + 1] - xy[2 * chosen + 1], along = x * dx + y * dy, across = Math.abs(x * dy) + Math.abs(y * dx);
    const away = along + 3 * across;
    if (along > 0 && across <= along && away < least) { least = away; next = i; }
  }
  if (next >= 0) chooseSpot(next);
}

for (const side of SIDES) {
  const canvas = $(side), down = new Map();
  let moved = 0;
  canvas.addEventListener("wheel", event => {
    event.preventDefault();
    if (state.section) zoomBy(Math.exp(-event.deltaY * (event.deltaMode ? 0.03 : 0.0015)), ...fromMiddle(event));
  }, { passive: false });
  canvas.addEventListener("pointerdown", event => {
    canvas.setPointerCapture(event.pointerId);
    if (!down.size) moved = 0;
    down.set(event.pointerId, fromMiddle(event));
  });
  canvas.addEventListener("pointermove", event => {
    if (!state.section) return;
    const before = down.get(event.pointerId), now = fromMiddle(event);
    if (!before) { point(event); return; }
    const [x, y] = [now[0] - before[0], now[1] - before[1]];
    const other = [...down].find(([id]) => id !== event.pointerId)?.[1];
    moved += Math.hypot(x, y);
    down.set(event.pointerId, now);
    if (state.hover >= 0) leave();
    if (other) {
      const apart = ([a, b]) => Math.max(1, Math.hypot(a - other[0], b - other[1]));
      moveBy(x / 2, y / 2);
      zoomBy(apart(now) / apart(before), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
    } else moveBy(x, y);
  });
  canvas.addEventListener("pointerup", event => { if (down.delete(event.pointerId) && moved < 5 && state.section) chooseSpot(spotUnder(event)); });
  canvas.addEventListener("pointercancel", event => down.delete(event.pointerId));
  canvas.addEventListener("pointerleave", leave);
  canvas.addEventListener("keydown", event => {
    const act = event.shiftKey && STEPS[event.key] ? () => step(STEPS[event.key]) : KEYS[event.key];
    if (!act || !state.section || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    act();
  });
  const choices = [...page.sections[0].layers, "image"];
  $(`${side}-shows`).append(...choices.map(layer => new Option(SHOWN[layer], layer)));
  $(`${side}-shows`).value = side === "left" ? choices[0] : choices[1];
  $(`${side}-shows`).addEventListener("change", choose);
}
for (const bar of document.querySelectorAll(".legend i")) bar.style.background = `linear-gradient(to right, ${COLOURS.filter((_, i) => i % 15 === 0)})`;
new ResizeObserver(redraw).observe($("left"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

function showGene(name) {
  const gene = page.genes.findIndex(own => own.toLowerCase() === name.trim().toLowerCase());
  if (gene < 0) {
    const known = page.table.rows.some(row => row.gene.toLowerCase() === name.trim().toLowerCase());
    $("about-gene").textContent = known ? `${name} is predicted, but its map is not in this file` : `${name} is not among the ${page.table.rows.length} genes`;
    return;
  }
  state.gene = gene;
  if (state.section) choose();
}

async function showSection(number) {
  const section = await sectionData(number);
  Object.assign(state, { section, chosen: -1, shown: {} });
  leave();
  wholeSection();
  await choose();
}

function changeScale() {
  const how = $("scale").value, at = state.limits.predicted ?? Object.values(state.limits)[0];
  $("limits").hidden = how !== "fixed";
  if (how === "fixed" && at && $("from").value === "") { $("from").value = fixed(at.low, 2); $("to").value = fixed(at.high, 2); }
  choose();
}

$("controls").addEventListener("submit", event => { event.preventDefault(); showGene($("gene").value); });
$("section")?.addEventListener("change", event => showSection(Number(event.target.value)));
$("gene").addEventListener("change", event => showGene(event.target.value));
$("gene").addEventListener("focus", event => event.target.select());
$("scale").addEventListener("change", changeScale);
for (const id of ["from", "to"]) $(id).addEventListener("input", choose);
for (const id of ["opacity", "fade"]) $(id)?.addEventListener("input", redraw);
$("closer").addEventListener("click", () => zoomBy(1.3));
$("farther").addEventListener("click", () => zoomBy(1 / 1.3));
$("whole").addEventListener("click", wholeSection);
