"use strict";
const root = document.documentElement;
addEventListener("error", event => { root.dataset.error = event.message; });
addEventListener("unhandledrejection", event => { root.dataset.error = String(event.reason); });

const $ = id => document.getElementById(id);
const page = JSON.parse($("page").textContent);
const MISSING = 255, BITMAPS = 120; // cells kept decoded, 1 MB each
const fixed = (value, digits = 3) => value === null || value === undefined || Number.isNaN(value) ? "–" : value.toFixed(digits);

// colour of the page by its name, light or dark
const ink = name => getComputedStyle(root).getPropertyValue(`--${name}`).trim();

// ---- data: packed arrays of a section -----------------------------------------------------------------------------

function bytesOf(id) {
  const text = atob($(id).textContent), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

async function unpack(id, Type) {
  const stream = new Blob([bytesOf(id)]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Type(await new Response(stream).arrayBuffer());
}

const bitmapOf = bytes => createImageBitmap(new Blob([bytes], { type: "image/jpeg" }));

function picture(uri) {
  return new Promise(resolve => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => resolve(null);
    image.src = uri;
  });
}

async function load(number) {
  const section = { ...page.sections[number], number, values: {}, moments: null };
  const waiting = section.layers.map(async layer => {
    const [codes, range] = await Promise.all([unpack(`${number}-${layer}`, Uint8Array), unpack(`${number}-${layer}-range`, Float32Array)]);
    section.values[layer] = { codes, range };
  });
  section.xy = await unpack(`${number}-xy`, Float32Array);
  if ($(`${number}-pearson`)) section.pearson = await unpack(`${number}-pearson`, Float32Array);
  if ($(`${number}-neighbours`)) {
    section.neighbours = await unpack(`${number}-neighbours`, Int32Array);
    section.weights = await unpack(`${number}-weights`, Float32Array);
  }
  section.bitmap = section.image && await picture(section.image.uri);
  if (section.slide) {
    section.jpeg = bytesOf(`${number}-slide`);
    // the coarsest level is always there to be drawn
    await Promise.all(section.slide.levels[0].cells.map(async cell => { cell.bitmap = await bitmapOf(section.jpeg.subarray(cell[2], cell[3])); }));
  }
  await Promise.all(waiting);
  return section;
}

const loaded = new Map();
const sectionData = number => loaded.get(number) ?? loaded.set(number, load(number)).get(number);

// Values of a gene in a section, NaN where there is none.
function geneValues(section, layer, gene) {
  const own = section.values[layer], spots = section.spots.length, genes = page.genes.length;
  if (!own) return new Float32Array(spots).fill(NaN);
  const low = own.range[gene], step = (own.range[genes + gene] - low) / page.steps[layer];
  return Float32Array.from(own.codes.subarray(gene * spots, (gene + 1) * spots), code => code === MISSING ? NaN : low + code * step);
}

function valueAt(section, layer, gene, spot) {
  const own = section.values[layer];
  if (!own) return NaN;
  const code = own.codes[gene * section.spots.length + spot], low = own.range[gene];
  return code === MISSING ? NaN : low + code * (own.range[page.genes.length + gene] - low) / page.steps[layer];
}

// ---- slide: from coarse cells to those as fine as the view ----------------------------------------------------------

const decoded = [];

function request(section, cell, then) {
  if (cell.waiting) return;
  cell.waiting = true;
  bitmapOf(section.jpeg.subarray(cell[2], cell[3])).then(bitmap => {
    cell.bitmap = bitmap;
    cell.waiting = false;
    decoded.push(cell);
    if (decoded.length > BITMAPS) { const old = decoded.shift(); old.bitmap.close(); old.bitmap = null; }
    then();
  });
}

// (left, top): where level-0 px (0, 0) lies on the canvas; zoom: canvas px per level-0 px
function drawSlide(pen, section, left, top, zoom, width, height, ratio, then) {
  if (section.bitmap) pen.drawImage(section.bitmap, left, top, section.image.width * zoom, section.image.height * zoom);
  if (!section.slide) return;
  const { levels, cell: side, width: wide, height: high } = section.slide;
  let last = levels.findIndex(level => level.downsample * zoom * ratio <= 1.4);
  if (last < 0) last = levels.length - 1;
  for (let i = 0; i <= last; i++) {
    const pitch = side * levels[i].downsample;
    for (const cell of levels[i].cells) {
      const x = cell[0] * pitch, y = cell[1] * pitch, w = Math.min(pitch, wide - x), h = Math.min(pitch, high - y);
      const x0 = left + x * zoom, y0 = top + y * zoom, x1 = x0 + w * zoom, y1 = y0 + h * zoom;
      if (x1 < 0 || y1 < 0 || x0 > width || y0 > height) continue;
      if (!cell.bitmap) { if (i === last) request(section, cell, then); continue; }
      // on whole px of the screen, so that no line shows between cells
      const [a, b, c, d] = [x0, y0, x1, y1].map(v => Math.round(v * ratio) / ratio);
      pen.drawImage(cell.bitmap, a, b, c - a, d - b);
    }
  }
}

// A canvas as sharp as the screen; null where it is not shown.
function penOf(canvas) {
  const ratio = devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
  if (!width) return null;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  return { pen, width, height, ratio };
}
