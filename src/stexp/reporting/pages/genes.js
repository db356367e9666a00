// ---- genes ------------------------------------------------------------------------------------------------------

const ROWS = 200;
const { columns, rows } = page.table, kindOf = Object.fromEntries(columns.map(({ key, kind }) => [key, kind]));
const table = { key: columns.find(({ kind }) => kind === "number").key, down: true, limit: ROWS };

function cell(row, { key, kind }) {
  if (kind === "text") return row[key];
  if (kind === "flag") return row[key] ? "●" : "";
  return fixed(row[key], kind === "count" ? 0 : 3);
}

function fill() {
  const wanted = $("filter").value.trim().toLowerCase(), { key, down, limit } = table;
  const kept = rows.filter(row => row.gene.toLowerCase().includes(wanted)).sort((a, b) => {
    if (a[key] === null || b[key] === null) return (a[key] === null) - (b[key] === null); // no value: last, either way
    const order = kindOf[key] === "text" ? a[key].localeCompare(b[key]) : a[key] - b[key];
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
      if (column.kind === "text") td.className = "text";
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
    table.down = table.key === column.key ? !table.down : column.kind !== "text";
    Object.assign(table, { key: column.key, limit: ROWS });
    mark();
    fill();
  });
  head.append(button);
  head.dataset.key = column.key;
  if (column.kind === "text") head.className = "text";
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
state.gene = page.first;
showSection(0).then(() => requestAnimationFrame(() => { root.dataset.ready = "yes"; }));
