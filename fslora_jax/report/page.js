// Shows the chosen view of each figure, hides series, tells what a point is, and sorts the tables.
"use strict";

const charts = JSON.parse(document.getElementById("data").textContent);
const figures = [...document.querySelectorAll("figure[data-chart]")];
const hidden = new Set(); // series that a legend has switched off, in all charts that have one
const FEW = 10; // series that are shown at first

for (const chart of Object.values(charts)) {
  const columns = Object.entries(chart.columns).map(([name, c]) => [name, c.texts ? c.at.map((i) => c.texts[i]) : c]);
  chart.rows = columns[0][1].map((_, i) => Object.fromEntries(columns.map(([name, column]) => [name, column[i]])));
  if (chart.kind === "lines") for (const series of chart.series.slice(FEW)) hidden.add(series);
}

const format = (x) => {
  const size = Math.abs(x);
  if (Number.isInteger(x)) return x.toLocaleString("en");
  return size >= 1000 ? Math.round(x).toLocaleString("en") : size < 0.001 ? x.toExponential(2) : x.toPrecision(4).replace(/\.?0+$/, "");
};
const interval = (d) => format(d.mean) + ((d.low ?? null) === null ? "" : ` (${format(d.low)} to ${format(d.high)})`);
const repetitions = (d) => (d.n > 1 ? [`${d.n} repetitions`] : []);

// The lines that tell a row.
const TOLD = {
  lines: (d, chart, x, measure) => {
    const name = measure === "main" ? chart.metrics[d.panel] : chart.measures[measure];
    return [d.series, `${name}: ${interval(d)}`, `${chart.xs[x]}: ${format(d[x])}`, ...repetitions(d)];
  },
  intervals: (d) => [d.series, `${d.metric.replaceAll("_", " ")}: ${interval(d)}`, ...repetitions(d)],
  clients: (d, chart, _, measure) => [d.series, d.client + (d.k === null ? "" : `, k = ${d.k}`), `${chart.measures[measure]}: ${format(d.value)}`],
  shares: (d) => [`client ${d.client}`, `${d.series}: ${format(d.examples)} examples`],
};

function choose(figure) {
  const chosen = {};
  for (const control of figure.querySelectorAll(".controls input:checked, .controls select")) chosen[control.dataset.choice] = control.value;
  for (const view of figure.querySelectorAll(".view"))
    view.hidden = Object.entries(chosen).some(([name, value]) => view.dataset[name] !== value);
}

function toggle() {
  for (const figure of figures) {
    const names = charts[figure.dataset.chart].series;
    for (const part of figure.querySelectorAll("[data-series]")) {
      const off = hidden.has(names[part.dataset.series]);
      if (part.matches("button")) part.setAttribute("aria-pressed", String(!off));
      else part.style.display = off ? "none" : "";
    }
  }
}

function press(button, names) {
  const all = [...button.parentNode.querySelectorAll("[data-series]")].map((other) => names[other.dataset.series]);
  const series = names[button.dataset.series];
  if (button.dataset.all === "show") all.forEach((name) => hidden.delete(name));
  else if (button.dataset.all === "hide") all.forEach((name) => hidden.add(name));
  else if (!hidden.delete(series)) hidden.add(series);
  toggle();
}

// The rows of a drawing that can be seen, each with its place in the drawing's coordinates.
function points(svg, chart) {
  const { x, measure } = svg.closest(".view").dataset;
  const { panel } = svg.closest(".panel").dataset;
  const rows = chart.rows.filter((d) => (!measure || d.measure === measure) && d.panel === panel && (!x || d[x] !== null));
  const places = svg.dataset.at.split(";");
  const found = rows.map((row, i) => ({ row, x: parseFloat(places[i]), y: parseFloat(places[i].split(",")[1]) }));
  const legend = chart.kind === "lines" || chart.kind === "shares";
  return found.filter((d) => places.length && !isNaN(d.x) && !(legend && hidden.has(d.row.series)));
}

function tell(svg, chart, point) {
  const [spot, tip, box] = [svg.querySelector(".spot"), svg.nextElementSibling, svg.viewBox.baseVal];
  spot.style.display = point ? "inline" : "";
  tip.textContent = "";
  if (!point) return;
  const { x, measure } = svg.closest(".view").dataset;
  spot.setAttribute("cx", point.x);
  spot.setAttribute("cy", point.y);
  tip.textContent = TOLD[chart.kind](point.row, chart, x, measure).join("\n");
  const [right, low] = [point.x > box.width / 2, point.y > box.height / 2];
  const part = (length, whole) => `calc(${(100 * length) / whole}% + 0.6rem)`;
  tip.style.left = right ? "auto" : part(point.x, box.width);
  tip.style.right = right ? part(box.width - point.x, box.width) : "auto";
  tip.style.top = low ? "auto" : part(point.y, box.height);
  tip.style.bottom = low ? part(box.height - point.y, box.height) : "auto";
}

// The pointer tells the nearest point, of a bar or curve under it its own; so do the arrow keys, one after the other.
function tells(svg, chart) {
  let at = -1;
  const across = chart.kind === "lines" || chart.kind === "clients" ? 1 : 0.01;
  const near = (event) => {
    const [{ left, top, width }, box] = [svg.getBoundingClientRect(), svg.viewBox.baseVal];
    const [x, y] = [event.clientX - left, event.clientY - top].map((length) => (length * box.width) / width);
    const over = event.target.closest("[data-series]")?.dataset.series;
    const far = (d) => Math.hypot(across * (d.x - x), d.y - y) + (over && d.row.series !== chart.series[over] ? 1e6 : 0);
    const all = points(svg, chart);
    tell(svg, chart, all.length ? all.reduce((best, d) => (far(d) < far(best) ? d : best)) : null);
  };
  svg.setAttribute("tabindex", "0");
  svg.addEventListener("pointermove", near);
  svg.addEventListener("pointerdown", near);
  for (const end of ["pointerleave", "blur"]) svg.addEventListener(end, () => tell(svg, chart, null));
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const all = points(svg, chart);
    if (event.key === "Escape") tell(svg, chart, null);
    if (!step || !all.length) return;
    event.preventDefault();
    at = (Math.max(at, step < 0 ? 0 : -1) + step + all.length) % all.length;
    tell(svg, chart, all[at]);
  });
}

for (const figure of figures) {
  const chart = charts[figure.dataset.chart];
  figure.querySelector(".controls").addEventListener("change", () => choose(figure));
  for (const button of figure.querySelectorAll(".legend button")) button.addEventListener("click", () => press(button, chart.series));
  for (const svg of figure.querySelectorAll(".plot svg")) tells(svg, chart);
  choose(figure);
}
toggle();

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
