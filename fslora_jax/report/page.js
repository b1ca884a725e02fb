// Draws the charts of the page's data with Observable Plot, and sorts its tables.
"use strict";

const charts = JSON.parse(document.getElementById("data").textContent);
const hidden = new Set(); // series that a legend has switched off, in all charts that have one
const FEW = 10; // series that are shown at first

for (const chart of Object.values(charts)) {
  const columns = Object.entries(chart.columns).map(([name, c]) => [name, c.texts ? c.at.map((i) => c.texts[i]) : c]);
  chart.rows = columns[0][1].map((_, i) => Object.fromEntries(columns.map(([name, column]) => [name, column[i]])));
  chart.legend = chart.kind === "lines" || chart.kind === "shares";
  if (chart.kind === "lines") for (const series of Object.keys(chart.series).slice(FEW)) hidden.add(series);
}

const format = (x) => {
  if (x === null || x === undefined) return "";
  const size = Math.abs(x);
  if (Number.isInteger(x)) return x.toLocaleString("en");
  return size >= 1000 ? Math.round(x).toLocaleString("en") : size < 0.001 ? x.toExponential(2) : x.toPrecision(4).replace(/\.?0+$/, "");
};
const interval = (d) => format(d.mean) + (d.low === null || d.low === undefined ? "" : ` (${format(d.low)} to ${format(d.high)})`);
const colour = (chart, series) => `var(--s${chart.series[series].colour})`;
const dash = (chart, series) => chart.series[series].dash.join(" ") || null;

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// Options that all plots share; the drawing is one image with a name, its numbers are in the tables.
const plot = (width, label, options) => {
  const svg = Plot.plot({ width, marginRight: 14, marginBottom: 44, style: { fontFamily: "inherit", fontSize: "12px" }, ...options });
  for (const part of svg.querySelectorAll("[aria-label]")) {
    part.dataset.part = part.getAttribute("aria-label");
    part.removeAttribute("aria-label"); // parts of an image have no name of their own
  }
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", label);
  return svg;
};
const log = (values) => Math.min(...values) > 0 && Math.max(...values) / Math.min(...values) >= 30;

function lines(chart, rows, { width, label, measure, x }) {
  const bars = chart.ends === "bars";
  const name = measure === "main" ? chart.metrics[rows[0].panel] : chart.measures[measure];
  const marks = [Plot.gridY({ ticks: 5 })];
  const names = [...new Set(rows.map((d) => d.series))];
  names.forEach((series, i) => {
    const mine = rows.filter((d) => d.series === series);
    const ends = mine.filter((d) => d.low !== null && d.low !== undefined);
    const stroke = colour(chart, series);
    const dx = bars ? 3 * (i - (names.length - 1) / 2) : 0; // intervals beside each other
    if (bars) marks.push(Plot.ruleX(ends, { x, y1: "low", y2: "high", dx, stroke, strokeWidth: 1.5 }));
    else if (ends.length > 1) marks.push(Plot.areaY(ends, { x, y1: "low", y2: "high", fill: stroke, fillOpacity: 0.14 }));
    marks.push(Plot.lineY(mine, { x, y: "mean", dx, stroke, strokeWidth: 1.8, strokeDasharray: dash(chart, series) }));
    const every = Math.ceil(mine.length / 12);
    const marked = mine.filter((_, j) => (mine.length - 1 - j) % every === 0);
    marks.push(Plot.dot(marked, { x, y: "mean", dx, symbol: chart.series[series].marker, r: 3.5, stroke, fill: stroke }));
  });
  const title = (d) => [d.series, `${name}: ${interval(d)}`, `${chart.xs[x]}: ${format(d[x])}`, ...(d.n > 1 ? [`${d.n} repetitions`] : [])].join("\n");
  marks.push(Plot.tip(rows, Plot.pointer({ x, y: "mean", title })));
  const type = bars && log(rows.map((d) => d[x])) ? "log" : "linear";
  return plot(width, label, {
    height: 260,
    marginLeft: 52,
    x: { label: chart.xs[x], labelArrow: "none", type, inset: bars ? 14 : 0, nice: !bars, ticks: Math.min(7, width / 60), tickFormat: format, labelOffset: 38 },
    y: { label: name, labelArrow: "none", nice: true, ticks: 5, tickFormat: format },
    marks,
  });
}

function intervals(chart, rows, { width, label }) {
  const plain = chart.ends === "differences";
  const paint = (d) => (plain ? "var(--s0)" : colour(chart, d.series));
  const y = (d) => rows.indexOf(d);
  const ends = rows.flatMap((d) => [d.low ?? d.mean, d.high ?? d.mean, ...(plain ? [0] : [])]);
  const [least, most] = [Math.min(...ends), Math.max(...ends)];
  const room = least === most ? Math.abs(least) / 10 || 1 : 0; // a single value gets an axis all the same
  const title = (d) => [d.series, `${d.metric.replaceAll("_", " ")}: ${interval(d)}`, `n = ${d.n}`].join("\n");
  return plot(width, label, {
    height: 56 + 36 * rows.length,
    marginLeft: 8,
    x: { domain: [least - room, most + room], label: rows[0].metric.replaceAll("_", " ") + (plain ? ", difference" : ""), labelArrow: "none", nice: true, ticks: Math.min(6, width / 70), tickFormat: format, labelOffset: 38 },
    y: { axis: null, domain: [-0.5, rows.length - 0.4], reverse: true },
    marks: [
      Plot.gridX({ ticks: Math.min(6, width / 70) }),
      ...(plain ? [Plot.ruleX([0], { stroke: "currentColor", strokeOpacity: 0.6 })] : []),
      Plot.link(rows.filter((d) => d.low !== null), { x1: "low", x2: "high", y1: y, y2: y, stroke: paint, strokeWidth: 2 }),
      ...rows.map((d) => Plot.dot([d], { x: "mean", y: () => y(d), symbol: plain ? "circle" : chart.series[d.series].marker, r: 4, fill: paint, stroke: paint })),
      Plot.text(rows, { y, text: "series", frameAnchor: "left", dy: -13, lineWidth: width / 13, textOverflow: "ellipsis-end", fill: "currentColor", stroke: "var(--surface)", strokeWidth: 4 }),
      Plot.tip(rows, Plot.pointerY({ x: "mean", y, title })),
    ],
  });
}

function clients(chart, rows, { width, label, measure }) {
  const names = [...new Set(rows.map((d) => d.series))];
  const y = (d) => names.indexOf(d.series);
  const means = names.map((series) => {
    const mine = rows.filter((d) => d.series === series);
    return { series, value: mine.reduce((sum, d) => sum + d.value, 0) / mine.length };
  });
  const title = (d) => [d.series, d.client + (d.k === null ? "" : `, k = ${d.k}`), `${chart.measures[measure]}: ${format(d.value)}`].join("\n");
  return plot(width, label, {
    height: 56 + 44 * names.length,
    marginLeft: 8,
    x: { label: chart.measures[measure], labelArrow: "none", nice: true, ticks: Math.min(6, width / 70), tickFormat: format, labelOffset: 38 },
    y: { axis: null, domain: [-0.6, names.length - 0.5], reverse: true },
    marks: [
      Plot.gridX({ ticks: Math.min(6, width / 70) }),
      Plot.link(rows, { x1: "value", x2: "value", y1: (d) => y(d) - 0.15, y2: (d) => y(d) + 0.2, stroke: (d) => colour(chart, d.series), strokeOpacity: 0.55, strokeWidth: 1.5 }),
      Plot.dot(means, { x: "value", y: (d) => y(d) + 0.03, symbol: "diamond", r: 5, fill: "currentColor", stroke: "var(--surface)" }),
      Plot.text(means, { y, text: (d) => `${d.series}: mean ${format(d.value)}`, frameAnchor: "left", dy: -16, lineWidth: width / 13, textOverflow: "ellipsis-end", stroke: "var(--surface)", strokeWidth: 4, fill: "currentColor" }),
      Plot.tip(rows, Plot.pointer({ x: "value", y, title })),
    ],
  });
}

function shares(chart, rows, { width, label }) {
  const many = new Set(rows.map((d) => d.series)).size > 7;
  const title = (d) => `client ${d.client}\n${d.series}: ${format(d.examples)} examples`;
  const count = 1 + Math.max(...rows.map((d) => d.client));
  return plot(width, label, {
    height: 70 + Math.max(5, Math.min(16, 500 / count)) * count,
    marginLeft: 40,
    color: many ? { type: "ordinal", scheme: "cividis" } : undefined,
    x: { label: "examples", labelArrow: "none", nice: true, ticks: Math.min(7, width / 80), tickFormat: format, labelOffset: 38 },
    y: { label: "client", type: "band", padding: 0.15, tickSize: 0, tickFormat: (c) => (c % Math.ceil(count / 20) ? "" : c) },
    marks: [
      Plot.gridX({ ticks: Math.min(7, width / 80) }),
      Plot.barX(rows, Plot.stackX({ x: "examples", y: "client", fill: many ? "series" : (d) => colour(chart, d.series) })),
      Plot.tip(rows, Plot.pointerY(Plot.stackX({ x: "examples", y: "client", title }))),
    ],
  });
}

const KINDS = { lines, intervals, clients, shares };

function swatch(chart, series) {
  const stroke = colour(chart, series);
  const line = chart.kind === "lines" ? [Plot.ruleY([0], { stroke, strokeWidth: 2, strokeDasharray: dash(chart, series) })] : [];
  const symbol = chart.kind === "shares" ? "square" : chart.series[series].marker;
  const svg = Plot.plot({
    width: 30, height: 14, margin: 0, axis: null, x: { domain: [-1, 1] }, y: { domain: [-1, 1] },
    marks: [...line, Plot.dot([0], { x: [0], y: [0], symbol, r: chart.kind === "shares" ? 5 : 3.5, fill: stroke, stroke })],
  });
  svg.setAttribute("aria-hidden", "true");
  return svg;
}

function toggle(change) {
  change();
  for (const button of document.querySelectorAll(".legend [data-series]"))
    button.setAttribute("aria-pressed", String(!hidden.has(button.dataset.series)));
  drawAll();
}

function button(text, click, attributes = {}) {
  const made = element("button", { type: "button", ...attributes }, ...text);
  made.addEventListener("click", click);
  return made;
}

// A button for each series that could be shown; of many also one for all and one for none.
function legend(figure, chart, names) {
  const place = figure.querySelector(".legend");
  if (!chart.legend || names.length < 2 || place.dataset.names === names.join()) return;
  place.dataset.names = names.join();
  place.replaceChildren(
    ...names.map((series) => {
      const flip = () => (hidden.has(series) ? hidden.delete(series) : hidden.add(series));
      const attributes = { "aria-pressed": String(!hidden.has(series)), "data-series": series };
      return button([swatch(chart, series), series], () => toggle(flip), attributes);
    }),
  );
  if (names.length <= FEW) return;
  place.append(
    button(["show all"], () => toggle(() => names.forEach((series) => hidden.delete(series))), { class: "all" }),
    button(["hide all"], () => toggle(() => names.forEach((series) => hidden.add(series))), { class: "all" }),
  );
}

function draw(figure) {
  const chart = charts[figure.dataset.chart];
  const chosen = (name) => figure.querySelector(`select[name=${name}]`)?.value;
  const x = figure.querySelector("input:checked")?.value ?? Object.keys(chart.xs)[0];
  const measure = chosen("measure") ?? Object.keys(chart.measures)[0];
  const panel = chosen("panel");
  const possible = chart.rows.filter((d) => (measure === undefined || d.measure === measure) && (panel === undefined || d.panel === panel));
  const shown = possible.filter((d) => !(chart.legend && hidden.has(d.series)) && (x === undefined || d[x] !== null));
  const panels = [...new Set(possible.map((d) => d.panel))];
  legend(figure, chart, [...new Set(possible.map((d) => d.series))]);
  const place = figure.querySelector(".panels");
  place.replaceChildren();
  const made = panels.map((panel) => element("div", { class: "panel" }, ...(panel && panels.length > 1 ? [element("h4", {}, panel)] : [])));
  place.append(...made);
  panels.forEach((panel, i) => {
    const rows = shown.filter((d) => d.panel === panel);
    const label = `${figure.querySelector("h3").textContent}${panel ? `, ${panel}` : ""}`;
    const width = Math.max(240, Math.min(made[i].clientWidth, 760));
    made[i].append(rows.length ? KINDS[chart.kind](chart, rows, { width, label, measure, x }) : element("p", { class: "nothing" }, "Nothing to show here yet."));
  });
}

const figures = [...document.querySelectorAll("figure[data-chart]")];
const drawAll = () => figures.forEach(draw);
for (const figure of figures) figure.querySelector(".controls").addEventListener("change", () => draw(figure));
let known = 0;
new ResizeObserver(() => {
  if (document.body.clientWidth === known) return;
  known = document.body.clientWidth;
  drawAll();
}).observe(document.body);

// A column's button sorts by it, and again the other way round; what is missing stays at the end.
for (const head of document.querySelectorAll("table.sortable th"))
  head.querySelector("button").addEventListener("click", () => {
    const body = head.closest("table").tBodies[0];
    const down = head.getAttribute("aria-sort") === "ascending";
    const key = (row) => row.cells[head.cellIndex].dataset.key;
    const compare = (a, b) => (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
    const rows = [...body.rows].sort((a, b) => {
      const [one, other] = [key(a), key(b)];
      if (one === "" || other === "") return (one === "") - (other === "");
      return down ? compare(other, one) : compare(one, other);
    });
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...rows);
  });
