// ---- one spot: its tile, where its prediction is from, what stands out; and one gene's spots against the truth ------

function chooseSpot(spot) {
  state.chosen = spot;
  fillSpot();
  redraw();
}

// Mean and standard deviation of every gene's predictions over the section
function moments(section) {
  if (section.moments) return section.moments;
  const { codes, range } = section.values.predicted, spots = section.spots.length, genes = page.genes.length;
  const mean = new Float32Array(genes), sd = new Float32Array(genes);
  for (let gene = 0; gene < genes; gene++) {
    let sum = 0, squares = 0;
    for (let i = gene * spots; i < (gene + 1) * spots; i++) { sum += codes[i]; squares += codes[i] * codes[i]; }
    const step = (range[genes + gene] - range[gene]) / page.steps.predicted, middle = sum / spots;
    mean[gene] = range[gene] + middle * step;
    sd[gene] = Math.sqrt(Math.max(squares / spots - middle * middle, 0)) * step;
  }
  return section.moments = { mean, sd };
}

function element(name, text, ...children) {
  const made = document.createElement(name);
  if (text !== null) made.textContent = text;
  made.append(...children);
  return made;
}

const ofPatient = (section, patient) => patient && patient !== section ? `${section} · patient ${patient}` : section;

function fillSpot() {
  const { section, chosen, gene } = state;
  $("spot").hidden = chosen < 0;
  if (chosen < 0) return;
  const at = layer => valueAt(section, layer, gene, chosen), spread = at("uncertainty");
  $("spot-name").textContent = `Spot ${section.spots[chosen]}`;
  const facts = [["Section", ofPatient(section.name, section.patient)],
    ["Position", `${fixed(section.xy[2 * chosen], 0)}, ${fixed(section.xy[2 * chosen + 1], 0)} px`],
    [page.genes[gene], `${section.pearson ? `observed ${fixed(at("observed"), 2)}, ` : ""}predicted ${fixed(at("predicted"), 2)}${Number.isNaN(spread) ? "" : ` ± ${fixed(spread, 2)}`}`],
    ...(section.layers.includes("interval") ? [["Interval", `${fixed(at("interval"), 2)} wide`]] : []),
    ...(section.strange ? [["Unlike training", `more than ${fixed(100 * section.strange[chosen], 0)}% of the training's tiles`]] : []),
    ...(section.source ? [["Mostly from", section.source[chosen]]] : [])];
  $("spot-facts").replaceChildren(...facts.flatMap(([term, text]) => [element("dt", term), element("dd", text)]));
  fillNeighbours(section, chosen);
  fillTop(section, chosen);
}

function fillNeighbours(section, spot) {
  $("neighbours").hidden = !section.neighbours;
  if (!section.neighbours) return;
  const n = section.neighbours.length / section.spots.length, { references } = page;
  const rows = [...section.neighbours.subarray(spot * n, (spot + 1) * n)], weights = [...section.weights.subarray(spot * n, (spot + 1) * n)];
  $("neighbours").querySelector("ol").replaceChildren(...rows.map((row, i) => {
    const canvas = document.createElement("canvas"), name = references.spots ? ` ${references.spots[row]}` : "";
    canvas.dataset.tile = references.tile[row];
    canvas.hidden = references.tile[row] < 0;
    const from = references.sections[references.section[row]], patient = references.patients[references.patient[row]];
    return element("li", null, canvas, element("b", from + name),
      ...(patient === from ? [] : [element("span", `patient ${patient}`)]), element("span", `${fixed(100 * weights[i], 1)}% of the weight`));
  }));
  const together = weights.reduce((sum, weight) => sum + weight, 0);
  $("neighbours-note").textContent = `The ${rows.length} references that count most, together ${fixed(100 * together, 0)}% of the prediction.`
    + (rows.some(row => references.tile[row] < 0) ? " Not of all of them is the tile in this file." : "");
}

function fillTop(section, spot) {
  const { mean, sd } = moments(section), z = gene => sd[gene] > 0 ? (valueAt(section, "predicted", gene, spot) - mean[gene]) / sd[gene] : -Infinity;
  const top = page.genes.map((_, gene) => [z(gene), gene]).sort((a, b) => b[0] - a[0]).slice(0, 8);
  const columns = [...(section.pearson ? ["observed"] : []), "predicted"];
  $("top").querySelector("thead tr").replaceChildren(...["Gene", ...columns.map(name => SHOWN[name]), "SD above"].map(text => {
    const head = element("th", text);
    head.scope = "col";
    return head;
  }));
  $("top").querySelector("tbody").replaceChildren(...top.map(([above, gene]) => {
    const button = element("button", page.genes[gene]), head = element("th", null, button);
    head.scope = "row";
    button.type = "button";
    button.addEventListener("click", () => showGene(page.genes[gene]));
    return element("tr", null, head, ...columns.map(layer => element("td", fixed(valueAt(section, layer, gene, spot), 2))), element("td", fixed(above, 1)));
  }));
}

let sheet = null;

function paintSpot() {
  const { section, chosen } = state;
  if (chosen < 0 || !section) return;
  const canvas = penOf($("tile"));
  if (canvas) {
    const { pen, width, height, ratio } = canvas, side = section.slide?.side ?? 1.5 * section.spot_px, zoom = width / side;
    drawSlide(pen, section, width / 2 - section.xy[2 * chosen] * zoom, height / 2 - section.xy[2 * chosen + 1] * zoom, zoom, width, height, ratio, redraw);
    const finest = section.slide?.levels.at(-1).downsample;
    $("tile-size").textContent = finest ? `${fixed(side, 0)} px wide in the slide` + (finest > 1 ? `; shown at 1/${finest} of its resolution` : "") : "from a small image of the section";
  }
  if (!$("sheet")) return;
  if (!sheet) { sheet = "waiting"; bitmapOf(bytesOf("sheet")).then(bitmap => { sheet = bitmap; redraw(); }); }
  if (sheet === "waiting") return;
  const { px, columns } = page.references;
  for (const small of $("neighbours").querySelectorAll("canvas:not([hidden])")) {
    const at = Number(small.dataset.tile), own = penOf(small);
    if (own) own.pen.drawImage(sheet, at % columns * px, Math.floor(at / columns) * px, px, px, 0, 0, own.width, own.height);
  }
}

// ---- observed against predicted -------------------------------------------------------------------------------------

const PAD = { left: 54, right: 10, top: 8, bottom: 38 };

function ticks(low, high) {
  const raw = (high - low) / 4, size = 10 ** Math.floor(Math.log10(raw)), step = [1, 2, 5, 10].map(k => k * size).find(k => k >= raw);
  return Array.from({ length: Math.floor(high / step) - Math.ceil(low / step) + 1 }, (_, i) => (Math.ceil(low / step) + i) * step);
}

function scatterFrame() {
  const { observed, predicted } = state.shown, canvas = $("scatter");
  const range = values => values.reduce(([a, b], v) => Number.isNaN(v) ? [a, b] : [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
  const scale = (values, from, to) => {
    let [low, high] = range(values);
    if (!(low <= high)) return null;
    if (low === high) [low, high] = [low - 0.5, high + 0.5];
    const margin = 0.04 * (high - low);
    [low, high] = [low - margin, high + margin];
    return Object.assign(v => from + (v - low) / (high - low) * (to - from), { low, high });
  };
  const x = scale(observed, PAD.left, canvas.clientWidth - PAD.right), y = scale(predicted, canvas.clientHeight - PAD.bottom, PAD.top);
  return x && y ? { x, y } : null;
}

function paintScatter() {
  const { section, shown, gene } = state;
  $("scatter-figure").hidden = !section?.pearson || section.square;
  const canvas = section?.pearson && !section.square && shown.observed && penOf($("scatter"));
  if (!canvas) return;
  const { pen, width, height } = canvas, frame = scatterFrame(), name = page.genes[gene];
  $("scatter-title").textContent = `${name}, observed and predicted`;
  $("scatter").ariaLabel = `Predicted against observed ${name} in ${section.spots.length} spots, Pearson ${fixed(section.pearson[gene])}`;
  pen.fillStyle = ink("soft");
  if (!frame) { pen.fillText("not measured in this section", PAD.left, height / 2); return; }
  const { x, y } = frame;
  pen.font = `12px ${getComputedStyle(document.body).fontFamily}`;
  pen.strokeStyle = ink("line"); pen.lineWidth = 1;
  pen.textAlign = "center";
  for (const tick of ticks(x.low, x.high)) { pen.beginPath(); pen.moveTo(x(tick), PAD.top); pen.lineTo(x(tick), height - PAD.bottom); pen.stroke(); pen.fillText(Number(tick.toPrecision(4)), x(tick), height - PAD.bottom + 16); }
  pen.fillText("observed", (PAD.left + width - PAD.right) / 2, height - 6);
  pen.textAlign = "right";
  for (const tick of ticks(y.low, y.high)) { pen.beginPath(); pen.moveTo(PAD.left, y(tick)); pen.lineTo(width - PAD.right, y(tick)); pen.stroke(); pen.fillText(Number(tick.toPrecision(4)), PAD.left - 6, y(tick) + 4); }
  pen.save();
  pen.translate(11, (PAD.top + height - PAD.bottom) / 2); pen.rotate(-Math.PI / 2); pen.textAlign = "center"; pen.fillText("predicted", 0, 0);
  pen.restore();
  pen.save();
  pen.beginPath(); pen.rect(PAD.left, PAD.top, width - PAD.left - PAD.right, height - PAD.top - PAD.bottom); pen.clip();
  const low = Math.min(x.low, y.low), high = Math.max(x.high, y.high);
  pen.setLineDash([5, 4]); pen.strokeStyle = ink("zero"); pen.beginPath(); pen.moveTo(x(low), y(low)); pen.lineTo(x(high), y(high)); pen.stroke(); pen.setLineDash([]);
  pen.fillStyle = ink("method");
  pen.globalAlpha = Math.min(0.8, Math.max(0.15, 250 / section.spots.length));
  shown.observed.forEach((value, i) => { if (!Number.isNaN(value)) { pen.beginPath(); pen.arc(x(value), y(shown.predicted[i]), 2.6, 0, 2 * Math.PI); pen.fill(); } });
  pen.restore();
  for (const [spot, colour] of [[state.chosen, "#d4267d"], [state.hover, "#111"]]) {
    if (spot < 0 || Number.isNaN(shown.observed[spot])) continue;
    pen.beginPath(); pen.arc(x(shown.observed[spot]), y(shown.predicted[spot]), 5, 0, 2 * Math.PI);
    pen.strokeStyle = "#fff"; pen.lineWidth = 4; pen.stroke(); pen.strokeStyle = colour; pen.lineWidth = 2; pen.stroke();
  }
}

$("scatter").addEventListener("click", event => {
  const frame = state.section && scatterFrame(), box = event.target.getBoundingClientRect(), { observed, predicted } = state.shown;
  if (!frame) return;
  let nearest = -1, least = 12 ** 2;
  observed.forEach((value, i) => {
    const away = (frame.x(value) - event.clientX + box.left) ** 2 + (frame.y(predicted[i]) - event.clientY + box.top) ** 2;
    if (away < least) { least = away; nearest = i; }
  });
  if (nearest >= 0) chooseSpot(nearest);
});
