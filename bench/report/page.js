"use strict";
// ---------------------------------------------------------------------------------------------------- plots
const figures = JSON.parse(document.getElementById("figures").textContent);
const plots = [...document.querySelectorAll(".plot")];
const dark = matchMedia("(prefers-color-scheme: dark)");
const options = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"] };

/** Colours of text and grid, which are the page's. */
function colours() {
  const style = getComputedStyle(document.documentElement);
  const [text, grid, panel] = ["--text", "--grid", "--panel"].map((name) => style.getPropertyValue(name).trim());
  const axis = { gridcolor: grid, linecolor: grid };
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: text, family: style.fontFamily, size: 12 },
    hoverlabel: { bgcolor: panel, font: { color: text } },
    xaxis: axis,
    yaxis: axis,
  };
}

/** `into` with what `from` adds to it, objects inside merged too. */
function merged(into, from) {
  const result = { ...into };
  for (const [key, value] of Object.entries(from)) {
    const inside = value && typeof value === "object" && !Array.isArray(value);
    result[key] = inside ? merged(result[key] || {}, value) : value;
  }
  return result;
}

function draw(plot) {
  const { data, layout } = figures[Number(plot.dataset.figure)];
  return Plotly.react(plot, data, merged(layout, colours()), options).then(() => { plot.dataset.drawn = "yes"; });
}

// a plot is drawn when it is about to be seen: a phone need not draw them all at once
const watcher = new IntersectionObserver((seen) => {
  for (const { isIntersecting, target } of seen) {
    if (isIntersecting) {
      watcher.unobserve(target);
      draw(target);
    }
  }
}, { rootMargin: "600px" });
plots.forEach((plot) => watcher.observe(plot));
dark.addEventListener("change", () => plots.filter((plot) => plot.dataset.drawn).forEach(draw));
addEventListener("beforeprint", () => plots.filter((plot) => !plot.dataset.drawn).forEach(draw));
document.querySelectorAll(".keys button").forEach((key) => key.addEventListener("click", () => {
  const shown = key.getAttribute("aria-pressed") !== "true";
  key.setAttribute("aria-pressed", String(shown));
  figures[key.dataset.figure].data[key.dataset.trace].visible = shown;
  draw(document.querySelector(`.plot[data-figure="${key.dataset.figure}"]`));
}));

// ---------------------------------------------------------------------------------------------------- all rows
const form = document.getElementById("filter");
const table = document.getElementById("all");
const body = table.tBodies[0];
const headings = [...table.tHead.rows[0].cells];
const lines = [...body.rows].map((row) => ({
  row,
  cells: [...row.cells].map((cell) => cell.textContent),
  text: row.textContent.toLowerCase(),
}));
const places = new Map(headings.map((heading, i) => [heading.textContent, i]));

function filter() {
  const words = form.elements.words.value.toLowerCase().split(/\s+/).filter(Boolean);
  const menus = [...form.querySelectorAll("select")].filter((menu) => menu.value);
  let shown = 0;
  for (const { row, cells, text } of lines) {
    const fits = words.every((word) => text.includes(word))
      && menus.every((menu) => cells[places.get(menu.name)] === menu.value)
      && (!form.elements.newest.checked || row.dataset.newest === "yes");
    row.hidden = !fits;
    shown += fits;
  }
  document.getElementById("shown").textContent = `${shown} of ${lines.length} rows`;
}

function sort(place) {
  const heading = headings[place];
  const order = heading.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
  headings.forEach((one) => one.setAttribute("aria-sort", one === heading ? order : "none"));
  const numeric = heading.classList.contains("number");
  const sign = order === "ascending" ? 1 : -1;
  const compare = new Intl.Collator("en", { numeric: true }).compare;
  lines.sort(({ cells: a }, { cells: b }) => {
    const [x, y] = [a[place], b[place]];
    if (!x || !y) return x ? -1 : y ? 1 : 0; // what is missing comes last in either order
    return sign * (numeric ? parseFloat(x) - parseFloat(y) : compare(x, y));
  });
  body.append(...lines.map(({ row }) => row));
}

form.addEventListener("input", filter);
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("reset", () => setTimeout(filter));
headings.forEach((heading, place) => heading.querySelector("button").addEventListener("click", () => sort(place)));
filter(); // a browser may have kept the fields
