"use strict";
// What needs nothing of the page's data.

function rgba(hex, alpha) {
  const [r, g, b] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  return `rgba(${r},${g},${b},${alpha})`;
}

function byteUnit(largest) {
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  const power = largest < 1 ? 0 : Math.min(Math.floor(Math.log10(largest) / 3 + 1e-9), units.length - 1);
  return [1000 ** power, units[power]];
}

function compare(a, b, up) {
  if (a === "" || b === "") return (a === "") - (b === ""); // what is missing comes last
  const numeric = !isNaN(a) && !isNaN(b);
  const order = numeric ? Number(a) - Number(b) : a.localeCompare(b, "en", { numeric: true });
  return up ? order : -order;
}

// The mean of up to `width` neighbours, fewer at the ends, as many on either side.
function smoothed(values, width) {
  const half = (width - 1) / 2;
  if (half < 1) return values;
  return values.map((value, at) => {
    const reach = Math.min(half, at, values.length - 1 - at);
    const near = values.slice(at - reach, at + reach + 1).filter((v) => v !== null);
    return value === null ? null : near.reduce((sum, v) => sum + v, 0) / near.length;
  });
}

// Whether a name has all the words that were typed, in any order.
function matches(name, words) {
  const low = name.toLowerCase();
  return words.toLowerCase().split(/\s+/).every((word) => low.includes(word));
}

// The curves as numbers: a line per group and round, in the units of rounds.jsonl.
function curvesAsCsv(groups, axes, measures) {
  const field = (text) => /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  const number = (value) => value === null || value === undefined ? "" : String(value);
  const head = ["run", ...axes.map((axis) => axis.key), ...measures.flatMap((m) => [m.key, `${m.key} sd`])];
  const lines = groups.flatMap((group) => Object.values(group.x)[0].map((_, at) => [
    field(group.label), ...axes.map((axis) => number(group.x[axis.key][at])),
    ...measures.flatMap((m) => [number(group.mean[m.key]?.[at]), number(group.sd?.[m.key]?.[at])]),
  ].join(",")));
  return `${head.join(",")}\n${lines.join("\n")}\n`;
}

function download(name, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
}

function sortTables() {
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const body = table.tBodies[0], value = (row) => row.cells[column].dataset.value;
      const rows = [...body.rows].sort((a, b) => compare(value(a), value(b), up));
      body.append(...rows);
    }));
  }
}

// Tables of runs; a client is no run.
function filterTables(words) {
  for (const row of document.querySelectorAll("table.sortable:not(.clients) tbody tr")) {
    row.hidden = !matches(row.cells[0].textContent, words);
  }
}
