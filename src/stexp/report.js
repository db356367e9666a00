"use strict";
const root = document.documentElement;
addEventListener("error", event => { root.dataset.error = event.message; });
addEventListener("unhandledrejection", event => { root.dataset.error = String(event.reason); });

const $ = id => document.getElementById(id);
const page = JSON.parse($("page").textContent);
const MISSING = 255, ROWS = 200, SIDES = ["observed", "predicted"];
const fixed = (value, digits = 3) => value === null || Number.isNaN(value) ? "–" : value.toFixed(digits);

// viridis, between anchors
const ANCHORS = ["440154", "482475", "414487", "355f8d", "2a788e", "21918c", "22a884", "44bf70", "7ad151", "bddf26", "fde725"]
  .map(hex => [0, 2, 4].map(at => parseInt(hex.slice(at, at + 2), 16)));
const COLOURS = Array.from({ length: 256 }, (_, i) => {
  const at = i / 255 * (ANCHORS.length - 1), left = Math.min(Math.floor(at), ANCHORS.length - 2);
  return `rgb(${ANCHORS[left].map((c, k) => Math.round(c + (at - left) * (ANCHORS[left + 1][k] - c)))})`;
});

// ---- data -------------------------------------------------------------------------------------------------------

async function unpack(id, Type) {
  const text = atob($(id).textContent), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Type(await new Response(stream).arrayBuffer());
}

function picture(uri) {
  return new Promise(resolve => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => resolve(null);
    image.src = uri;
  });
}

async function load(number) {
  const section = { ...page.sections[number], values: {} };
  section.xy = await unpack(`${number}-xy`, Float32Array);
  section.pearson = await unpack(`${number}-pearson`, Float32Array);
  for (const layer of section.layers) {
    section.values[layer] = {
      codes: await unpack(`${number}-${layer}`, Uint8Array), range: await unpack(`${number}-${layer}-range`, Float32Array),
    };
  }
  section.bitmap = section.image && await picture(section.image.uri);
  return section;
}

const loaded = new Map();
const sectionData = number => loaded.get(number) ?? loaded.set(number, load(number)).get(number);

// Values of one gene in the chosen section, NaN where there is none.
function geneValues(layer) {
  const own = state.section.values[layer], spots = state.section.spots.length, genes = page.genes.length;
  if (!own) return new Float32Array(spots).fill(NaN);
  const low = own.range[state.gene], step = (own.range[genes + state.gene] - low) / page.levels[layer];
  return Float32Array.from(own.codes.subarray(state.gene * spots, (state.gene + 1) * spots),
    code => code === MISSING ? NaN : low + code * step);
}

// ---- maps -------------------------------------------------------------------------------------------------------

const state = { section: null, gene: 0, shown: {}, view: { x: 0, y: 0, zoom: 1 }, hover: -1, pending: false };

function limits(...layers) {
  const values = layers.flatMap(layer => [...state.shown[layer]]).filter(v => !Number.isNaN(v)).sort((a, b) => a - b);
  if (!values.length) return null;
  const low = values[0], high = values[Math.floor(0.99 * (values.length - 1))];
  return { low, high: high > low ? high : values.at(-1), clipped: high > low && high < values.at(-1) };
}

function choose() {
  const { section, gene } = state;
  for (const layer of [...SIDES, "uncertainty"]) state.shown[layer] = geneValues(layer);
  const name = page.genes[gene], same = document.querySelector("[name=scale]:checked").value === "same";
  state.limits = {};
  for (const side of SIDES) {
    const at = state.limits[side] = same ? limits(...SIDES) : limits(side);
    const own = limits(side);
    $(`${side}-low`).textContent = at && own ? fixed(at.low, 2) : "";
    $(`${side}-high`).textContent = at && own ? (at.clipped ? "≥ " : "") + fixed(at.high, 2) : "";
    const notice = !own ? `${name} was not measured in section ${section.name}`
      : own.low === own.high ? `${side} ${name} is ${fixed(own.low, 2)} in every spot` : "";
    $(`${side}-notice`).textContent = notice;
    $(`${side}-notice`).hidden = !notice;
  }
  const row = page.table.rows.find(row => row.gene === name);
  $("about-gene").textContent = `${name} in section ${section.name}: Pearson ${fixed(section.pearson[gene])}`
    + (row ? `; mean over sections ${fixed(row.pearson)}, ceiling ${fixed(row.ceiling ?? null)}` : "");
  $("gene").value = name;
  for (const line of document.querySelectorAll("#table tbody tr")) line.ariaCurrent = line.dataset.gene === name ? "true" : null;
  redraw();
}

function redraw() {
  if (state.pending) return;
  state.pending = true;
  requestAnimationFrame(() => { state.pending = false; SIDES.forEach(paint); });
}

function paint(side) {
  const canvas = $(side), { section, view } = state, ratio = devicePixelRatio || 1;
  const width = canvas.clientWidth, height = canvas.clientHeight;
  if (!section || !width) return;
  if (canvas.width !== Math.round(width * ratio)) { canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio); }
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  const left = width / 2 - view.x * view.zoom, top = height / 2 - view.y * view.zoom;
  if (section.bitmap) pen.drawImage(section.bitmap, left, top, section.image.width * view.zoom, section.image.height * view.zoom);
  const radius = Math.max(section.spot_px * view.zoom / 2, 1.2), at = state.limits[side], values = state.shown[side];
  pen.globalAlpha = $("opacity").value / 100;
  for (let i = 0; i < values.length; i++) {
    const x = left + section.xy[2 * i] * view.zoom, y = top + section.xy[2 * i + 1] * view.zoom;
    if (x < -radius || y < -radius || x > width + radius || y > height + radius) continue;
    pen.beginPath();
    pen.arc(x, y, radius, 0, 2 * Math.PI);
    if (Number.isNaN(values[i])) { pen.strokeStyle = "#8b98a6"; pen.lineWidth = 1; pen.stroke(); continue; }
    const share = at.high > at.low ? (values[i] - at.low) / (at.high - at.low) : 0;
    pen.fillStyle = COLOURS[Math.round(255 * Math.min(Math.max(share, 0), 1))];
    pen.fill();
  }
  pen.globalAlpha = 1;
  if (state.hover < 0) return;
  pen.beginPath();
  pen.arc(left + section.xy[2 * state.hover] * view.zoom, top + section.xy[2 * state.hover + 1] * view.zoom, radius + 2, 0, 2 * Math.PI);
  pen.strokeStyle = "#fff"; pen.lineWidth = 4; pen.stroke();
  pen.strokeStyle = "#111"; pen.lineWidth = 1.8; pen.stroke();
}

function wholeSection() {
  const { xy, spot_px } = state.section, canvas = $("observed");
  let [x0, y0, x1, y1] = [Infinity, Infinity, -Infinity, -Infinity];
  for (let i = 0; i < xy.length; i += 2) {
    x0 = Math.min(x0, xy[i]); x1 = Math.max(x1, xy[i]); y0 = Math.min(y0, xy[i + 1]); y1 = Math.max(y1, xy[i + 1]);
  }
  const zoom = 0.94 * Math.min(canvas.clientWidth / (x1 - x0 + 2 * spot_px), canvas.clientHeight / (y1 - y0 + 2 * spot_px));
  state.view = { x: (x0 + x1) / 2, y: (y0 + y1) / 2, zoom, least: zoom / 4, most: zoom * 40 };
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

function point(event) {
  const { section, view } = state, box = event.target.getBoundingClientRect(), frame = document.querySelector(".maps").getBoundingClientRect();
  const x = (event.clientX - box.left - box.width / 2) / view.zoom + view.x, y = (event.clientY - box.top - box.height / 2) / view.zoom + view.y;
  let nearest = -1, least = Math.max(section.spot_px, 8 / view.zoom) ** 2;
  for (let i = 0; i < section.spots.length; i++) {
    const away = (section.xy[2 * i] - x) ** 2 + (section.xy[2 * i + 1] - y) ** 2;
    if (away < least) { least = away; nearest = i; }
  }
  state.hover = nearest;
  const tip = $("tip");
  tip.hidden = nearest < 0;
  if (nearest >= 0) {
    const { observed, predicted, uncertainty } = state.shown, spread = uncertainty[nearest];
    tip.textContent = [`spot ${section.spots[nearest]}`, `observed ${fixed(observed[nearest], 2)}`,
      `predicted ${fixed(predicted[nearest], 2)}${Number.isNaN(spread) ? "" : ` ± ${fixed(spread, 2)}`}`,
      ...(section.source ? [`mostly from ${section.source[nearest]}`] : [])].join("\n");
    const right = event.clientX - frame.left + 16;
    tip.style.left = `${right + tip.offsetWidth < frame.width ? right : right - tip.offsetWidth - 32}px`;
    tip.style.top = `${event.clientY - frame.top + 12}px`;
  }
  redraw();
}

function leave() { state.hover = -1; $("tip").hidden = true; redraw(); }

const KEYS = { "+": () => zoomBy(1.3), "=": () => zoomBy(1.3), "-": () => zoomBy(1 / 1.3), "0": wholeSection, ArrowLeft: () => moveBy(40, 0),
  ArrowRight: () => moveBy(-40, 0), ArrowUp: () => moveBy(0, 40), ArrowDown: () => moveBy(0, -40) };
for (const side of SIDES) {
  const canvas = $(side);
  canvas.addEventListener("wheel", event => {
    event.preventDefault();
    const box = canvas.getBoundingClientRect();
    zoomBy(Math.exp(-event.deltaY * (event.deltaMode ? 0.03 : 0.0015)), event.clientX - box.left - box.width / 2, event.clientY - box.top - box.height / 2);
  }, { passive: false });
  canvas.addEventListener("pointerdown", event => canvas.setPointerCapture(event.pointerId));
  canvas.addEventListener("pointermove", event => {
    if (!state.section) return;
    if (event.buttons) { leave(); moveBy(event.movementX, event.movementY); } else point(event);
  });
  canvas.addEventListener("pointerleave", leave);
  canvas.addEventListener("keydown", event => { if (KEYS[event.key]) { event.preventDefault(); KEYS[event.key](); } });
}
for (const bar of document.querySelectorAll(".legend i")) bar.style.background = `linear-gradient(to right, ${COLOURS.filter((_, i) => i % 15 === 0)})`;
new ResizeObserver(redraw).observe($("observed"));

function showGene(name) {
  const gene = page.genes.findIndex(own => own.toLowerCase() === name.trim().toLowerCase());
  if (gene < 0) { $("about-gene").textContent = `${name} is not in the panel of ${page.genes.length} genes`; return; }
  state.gene = gene;
  choose();
}

async function showSection(number) {
  state.section = await sectionData(number);
  leave();
  wholeSection();
  choose();
}

$("controls").addEventListener("submit", event => { event.preventDefault(); showGene($("gene").value); });
$("section").addEventListener("change", event => showSection(Number(event.target.value)));
$("gene").addEventListener("change", event => showGene(event.target.value));
$("gene").addEventListener("focus", event => event.target.select());
$("opacity").addEventListener("input", redraw);
for (const radio of document.querySelectorAll("[name=scale]")) radio.addEventListener("change", choose);
$("closer").addEventListener("click", () => zoomBy(1.3));
$("farther").addEventListener("click", () => zoomBy(1 / 1.3));
$("whole").addEventListener("click", wholeSection);

// ---- genes ------------------------------------------------------------------------------------------------------

const { columns, rows } = page.table;
const table = { key: "pearson", down: true, limit: ROWS };

function cell(row, { key }) {
  if (key === "heg50") return row[key] ? "●" : "";
  return key === "n_sections" ? fixed(row[key], 0) : fixed(row[key]);
}

function fill() {
  const wanted = $("filter").value.trim().toLowerCase(), { key, down, limit } = table;
  const kept = rows.filter(row => row.gene.toLowerCase().includes(wanted)).sort((a, b) => {
    if (a[key] === null || b[key] === null) return (a[key] === null) - (b[key] === null); // no value: last, either way
    const order = key === "gene" ? a.gene.localeCompare(b.gene) : a[key] - b[key];
    return down ? -order : order;
  });
  $("table").tBodies[0].replaceChildren(...kept.slice(0, limit).map(row => {
    const line = document.createElement("tr"), head = document.createElement("th"), button = document.createElement("button");
    line.dataset.gene = row.gene;
    line.ariaCurrent = row.gene === page.genes[state.gene] ? "true" : null;
    head.scope = "row";
    button.textContent = row.gene;
    head.append(button);
    line.append(head, ...columns.slice(1).map(column => {
      const td = document.createElement("td");
      td.textContent = cell(row, column);
      return td;
    }));
    line.addEventListener("click", () => { showGene(row.gene); $("maps").scrollIntoView(); });
    return line;
  }));
  $("count").textContent = `${kept.length} of ${rows.length} genes`;
  $("more").hidden = kept.length <= limit;
  $("more").textContent = `Show ${Math.min(ROWS, kept.length - limit)} more of ${kept.length}`;
}

for (const column of columns) {
  const head = document.createElement("th"), button = document.createElement("button");
  head.scope = "col";
  button.textContent = column.label;
  button.addEventListener("click", () => {
    table.down = table.key === column.key ? !table.down : column.key !== "gene";
    Object.assign(table, { key: column.key, limit: ROWS });
    mark();
    fill();
  });
  head.append(button);
  head.dataset.key = column.key;
  $("table").tHead.rows[0].append(head);
}

function mark() {
  for (const head of $("table").tHead.rows[0].cells) {
    head.ariaSort = head.dataset.key !== table.key ? null : table.down ? "descending" : "ascending";
  }
}

$("filter").addEventListener("input", () => { table.limit = ROWS; fill(); });
$("filter").form.addEventListener("submit", event => event.preventDefault());
$("more").addEventListener("click", () => { table.limit += ROWS; fill(); });

mark();
fill();
// start with the best predicted gene
const first = rows.length ? $("table").tBodies[0].rows[0].dataset.gene : page.genes[0];
state.gene = Math.max(0, page.genes.indexOf(first));
showSection(0).then(() => { root.dataset.ready = "yes"; });
