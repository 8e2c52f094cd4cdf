(async () => {
  const data = JSON.parse(document.getElementById("page-data").textContent);
  const { axes, measures, groups, pooled, swept } = data.curves;
  const DARK = window.matchMedia("(prefers-color-scheme: dark)");
  const COARSE = window.matchMedia("(pointer: coarse)");
  // Okabe and Ito's colours, in the order of the printed figures; lighter ones where the paper is dark.
  const LIGHT_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#56B4E9", "#E69F00"];
  const DARK_COLOURS = ["#4FA8E3", "#F58B45", "#2DC79D", "#EDEFF2", "#E3A0C7", "#9AD4F7", "#F7BE4F"];
  const DASHES = ["solid", "dash", "dot", "dashdot"];
  const STROKES = ["none", "7 3", "2 3", "7 3 2 3"];
  const MARKERS = ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x",
    "triangle-left", "triangle-right", "pentagon", "hexagon", "star"];
  const SHAPES = ["M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0", "M-4,-4h8v8h-8z", "M0,-5L5,4H-5z", "M0,-5L5,0L0,5L-5,0z",
    "M0,5L5,-4H-5z", "M-2,-5h4v3h3v4h-3v3h-4v-3h-3v-4h3z", "M-4,-4L4,4M4,-4L-4,4", "M-5,0L4,-5V5z", "M5,0L-4,-5V5z",
    "M0,-5L5,-1L3,4H-3L-5,-1z", "M-2.5,-4.5h5L5,0L2.5,4.5h-5L-5,0z", "M0,-5L2,-1H5L2,1L3,5L0,3L-3,5L-2,1L-5,-1H-2z"];
  const shown = groups.map(() => true);
  let printing = false, logX = null; // logX: what was chosen; null: as the runs' lengths ask for
  const logs = Object.fromEntries(measures.map((m) => [m.key, m.log]));
  const get = (id) => document.getElementById(id);
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const dark = () => DARK.matches && !printing; // paper is white
  const colour = (group) => (dark() ? DARK_COLOURS : LIGHT_COLOURS)[group.colour];
  const visible = (index) => shown[index] && matches(groups[index].label, get("filter").value);

  const value = (measure, name) => measure.unit ? `%{${name}:.1f}${measure.unit}` : `%{${name}:.5~g}`; // on hovering

  sortTables();
  const Plotly = await unpack();
  if (!Plotly) return;
  makeControls();
  makeCharts();
  makeSwept();
  redraw();
  drawBelow();
  DARK.addEventListener("change", () => { redraw(); drawBelow(); });
  window.addEventListener("beforeprint", () => print(true));
  window.addEventListener("afterprint", () => print(false));

  function redraw() {
    makeLegend();
    draw();
    drawSwept();
  }

  function print(begins) {
    printing = begins;
    document.documentElement.classList.toggle("printing", begins);
    for (const part of document.querySelectorAll("details:not(.long)")) {
      if (begins) part.dataset.open = part.open ? "yes" : "";
      part.open = begins || part.dataset.open === "yes";
    }
    redraw();
    drawBelow();
  }

  function drawBelow() {
    drawClients();
    drawPartitions();
  }

  async function unpack() {
    if (typeof DecompressionStream === "undefined") {
      get("waiting").textContent = "This browser is too old to draw the curves; the tables below say the same.";
      return null;
    }
    get("waiting").textContent = "Drawing …";
    const bytes = Uint8Array.from(atob(get("plotly-packed").textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
    return window.Plotly;
  }

  function makeControls() {
    for (const axis of axes) get("axis").append(new Option(axis.title.toLowerCase(), axis.key));
    const several = groups.some((group) => group.seeds);
    for (const id of ["bands", "each"]) get(id).parentElement.hidden = !several;
    for (const id of ["bands", "each", "smooth"]) get(id).addEventListener("change", draw);
    get("axis").addEventListener("change", () => { logX = null; draw(); });
    get("log-x").addEventListener("change", () => { logX = get("log-x").checked; draw(); });
    for (const [id, value] of [["all", true], ["none", false]]) {
      get(id).hidden = groups.length < 2;
      get(id).addEventListener("click", () => {
        groups.forEach((group, at) => { if (matches(group.label, get("filter").value)) shown[at] = value; });
        redraw();
      });
    }
    get("filter").parentElement.hidden = groups.length < 3;
    get("filter").addEventListener("input", () => { filterTables(get("filter").value); redraw(); });
    get("csv").addEventListener("click", () => {
      const kept = groups.filter((_, index) => visible(index));
      download("curves.csv", curvesAsCsv(kept, axes, measures));
    });
  }

  function makeLegend() {
    const focused = [...get("legend").children].indexOf(document.activeElement);
    get("legend").replaceChildren(...groups.map((group, index) => {
      const button = document.createElement("button");
      button.type = "button";
      button.setAttribute("aria-pressed", String(shown[index]));
      const ink = colour(group);
      button.innerHTML = `<svg width="38" height="14" viewBox="-19 -7 38 14" aria-hidden="true">
        <line x1="-18" x2="18" stroke="${ink}" stroke-width="2" stroke-dasharray="${STROKES[group.dash]}"></line>
        <path d="${SHAPES[group.marker]}" fill="${ink}" stroke="${ink}"></path></svg>`;
      button.append(Object.assign(document.createElement("span"), { textContent: group.label }));
      button.addEventListener("click", () => { shown[index] = !shown[index]; redraw(); });
      button.hidden = !matches(group.label, get("filter").value);
      return button;
    }));
    for (const one of pooled) {
      const entry = document.createElement("span");
      entry.innerHTML = `<svg width="38" height="14" viewBox="-19 -7 38 14" aria-hidden="true">
        <line x1="-18" x2="18" stroke="${css("--ink")}" stroke-width="1.5" stroke-dasharray="2 3"></line></svg>`;
      entry.append(one.label);
      get("legend").append(entry);
    }
    if (focused >= 0) get("legend").children[focused].focus();
  }

  function makeCharts() {
    get("charts").replaceChildren(...measures.map((measure) => {
      const card = document.createElement("div");
      card.className = "chart";
      const head = document.createElement("header");
      head.append(Object.assign(document.createElement("h3"), { textContent: measure.title }));
      const log = Object.assign(document.createElement("button"), { type: "button", textContent: "log scale" });
      log.setAttribute("aria-pressed", String(logs[measure.key]));
      log.setAttribute("aria-label", `${measure.title}: log scale`);
      log.addEventListener("click", () => {
        logs[measure.key] = !logs[measure.key];
        log.setAttribute("aria-pressed", String(logs[measure.key]));
        draw();
      });
      head.append(log);
      const plot = document.createElement("div");
      plot.className = "plot";
      plot.id = `plot-${measure.key}`;
      plot.setAttribute("role", "img");
      card.append(head, plot);
      return card;
    }));
  }

  function layout(more) {
    const ink = css("--ink"), grid = css("--grid"), line = css("--line");
    const axis = { gridcolor: grid, linecolor: line, zeroline: false, color: ink, automargin: true, title: { standoff: 8 } };
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
      font: { color: ink, family: "system-ui, sans-serif", size: 12 },
      margin: { l: 48, r: 12, t: 8, b: 42 }, hovermode: "closest",
      hoverlabel: { bgcolor: css("--raised"), bordercolor: line, font: { color: ink }, namelength: -1 },
      dragmode: COARSE.matches ? false : "zoom", // on a phone a finger scrolls the page
      ...more,
      xaxis: { ...axis, ...more.xaxis }, yaxis: { ...axis, ...more.yaxis },
    };
  }

  function traces(measure, axis, divisor) {
    const out = [];
    groups.forEach((group, index) => {
      if (!visible(index)) return;
      const ink = colour(group), mean = group.mean[measure.key];
      const kept = mean.map((value, at) => at).filter((at) => mean[at] !== null && group.x[axis][at] !== null);
      const scaled = (values, factor) => kept.map((at) => values[at] === null ? null : values[at] * factor);
      const pick = (values, factor) => smoothed(scaled(values, factor), Number(get("smooth").value));
      const x = scaled(group.x[axis], 1 / divisor), y = pick(mean, measure.factor);
      if (group.sd && get("bands").checked) {
        const sd = pick(group.sd[measure.key], measure.factor);
        const floor = (value, at) => logs[measure.key] ? Math.max(value, 0.5 * y[at]) : value;
        out.push({
          x: [...x, ...x.toReversed()], fill: "toself", fillcolor: rgba(ink, 0.15), line: { width: 0 }, hoverinfo: "skip",
          y: [...y.map((v, at) => v + sd[at]), ...y.map((v, at) => floor(v - sd[at], at)).toReversed()], mode: "lines",
        });
      }
      if (group.seeds && get("each").checked) {
        for (const seed of group.seeds[measure.key]) {
          out.push({ x, y: pick(seed, measure.factor), mode: "lines", line: { color: rgba(ink, 0.45), width: 0.8 }, hoverinfo: "skip" });
        }
      }
      out.push({
        x, y, name: group.label, mode: kept.length > 1 ? "lines+markers" : "markers", meta: "mean",
        line: { color: ink, width: 1.8, dash: DASHES[group.dash] },
        marker: { color: ink, symbol: MARKERS[group.marker], size: 6.5, maxdisplayed: 14 },
        hovertemplate: `${value(measure, "y")} at %{x:.5~g}<extra>%{fullData.name}</extra>`,
      });
    });
    const ends = out.flatMap((trace) => trace.meta === "mean" ? [trace.x[0], trace.x.at(-1)] : []);
    return [...out, ...baselines(measure, ends)];
  }

  // Where a pooled model ended, from the first to the last of these places.
  function baselines(measure, places) {
    return pooled.filter((one) => one.end[measure.key] && places.length).map((one) => {
      const level = one.end[measure.key][0] * measure.factor;
      return {
        x: [Math.min(...places), Math.max(...places)], y: [level, level], name: one.label, mode: "lines", meta: "pooled",
        line: { color: css("--ink"), width: 1.4, dash: "dot" },
        hovertemplate: `${value(measure, "y")}<extra>%{fullData.name}</extra>`,
      };
    });
  }

  function draw() {
    const axis = get("axis").value || "round";
    const ends = groups.map((group) => Math.max(...(group.x[axis] || [0]).filter((v) => v !== null))).filter((v) => v > 0);
    const [divisor, unit] = axis === "bytes_sent" ? byteUnit(Math.max(...ends, 0)) : [1, ""];
    const title = axes.find((one) => one.key === axis)?.title ?? "Rounds";
    // Where one run is ten times as long as another, the short one would be a vertical line.
    const wide = logX ?? (ends.length > 1 && Math.max(...ends) > 10 * Math.min(...ends));
    get("log-x").checked = wide;
    for (const measure of measures) {
      const plot = get(`plot-${measure.key}`);
      const names = groups.filter((_, index) => visible(index)).map((group) => group.label);
      plot.setAttribute("aria-label", `${measure.title} against ${title.toLowerCase()} of ${names.join("; ") || "nothing"}`);
      const more = {
        xaxis: { title: { text: unit ? `Sent by all clients (${unit})` : title }, type: wide ? "log" : "linear" },
        yaxis: logs[measure.key] ? { type: "log", exponentformat: "e", ...decades(measure) }
          : { type: "linear", ticksuffix: measure.unit },
      };
      show(plot, traces(measure, axis, divisor), more);
    }
  }

  function show(plot, lines, more) {
    const first = !plot.classList.contains("js-plotly-plot");
    Plotly.react(plot, lines, layout(more), { responsive: true, displayModeBar: false });
    if (first) plot.on("plotly_afterplot", () => fitPaper(plot));
    fitPaper(plot);
  }

  // A picture of known size: on paper it is scaled to the width that there is.
  function fitPaper(plot) {
    for (const picture of plot.querySelectorAll(".main-svg")) {
      const [width, height] = ["width", "height"].map((name) => picture.getAttribute(name));
      picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
      plot.style.setProperty("--ratio", `${width} / ${height}`);
    }
  }

  function makeSwept() {
    const keys = Object.entries(swept), judged = measures.filter((m) => m.judges);
    get("swept").hidden = !keys.length || !judged.length;
    if (get("swept").hidden) return;
    get("key").append(...keys.map(([key, title]) => new Option(title, key)));
    judged.sort((a, b) => (b.unit !== "") - (a.unit !== ""));
    get("measure").append(...judged.map((m) => new Option(m.title.toLowerCase(), m.key)));
    for (const id of ["key", "measure"]) get(id).addEventListener("change", drawSwept);
  }

  // What was reached at the end, against a key that differs: a line for all that differ in nothing else.
  function drawSwept() {
    if (get("swept").hidden) return;
    const key = get("key").value, measure = measures.find((m) => m.key === get("measure").value);
    const families = new Map();
    groups.forEach((group, index) => {
      if (!visible(index) || !group.end[measure.key]) return;
      families.set(group.family[key], [...(families.get(group.family[key]) ?? []), group]);
    });
    const out = [...families].map(([name, members]) => {
      members.sort((a, b) => a.at[key] - b.at[key]);
      const first = members[0], ends = members.map((group) => group.end[measure.key].map((v) => v === null ? null : v * measure.factor));
      return {
        x: members.map((group) => group.at[key]), y: ends.map((end) => end[0]), name, mode: "lines+markers",
        error_y: { type: "data", array: ends.map((end) => end[1] ?? 0), visible: ends.some((end) => end[1]), thickness: 1.2, width: 4 },
        line: { color: colour(first), width: 1.8, dash: DASHES[first.dash] },
        marker: { color: colour(first), symbol: MARKERS[first.marker], size: 8 }, meta: "mean",
        hovertemplate: `${value(measure, "y")} at %{x}<extra>%{fullData.name}</extra>`,
      };
    });
    const places = groups.map((group) => group.at[key]);
    const wide = Math.min(...places) > 0 && Math.max(...places) >= 8 * Math.min(...places);
    const own = [...new Set(places)].sort((a, b) => a - b);
    const more = {
      showlegend: true, legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { color: css("--ink") } },
      xaxis: { title: { text: swept[key] }, type: wide ? "log" : "linear", ...(own.length <= 8 && { tickvals: own, ticktext: own.map(String) }) },
      yaxis: logs[measure.key] ? { type: "log" } : { ticksuffix: measure.unit },
    };
    show(get("swept-plot"), [...out, ...baselines(measure, [Math.min(...places), Math.max(...places)])], more);
    get("swept-plot").setAttribute("aria-label", `${measure.title} at the end against ${swept[key]}: ${[...families.keys()].join("; ")}`);
  }

  // Over several powers of ten their own ticks are enough.
  function decades(measure) {
    const values = groups.flatMap((group) => group.mean[measure.key]).filter((value) => value > 0);
    return values.length && Math.max(...values) > 50 * Math.min(...values) 
      ? { dtick: Math.max(1, Math.ceil(Math.log10(Math.max(...values) / Math.min(...values)) / 6)) } : {};
  }

  function drawClients() {
    for (const place of document.querySelectorAll("[data-clients]")) {
      const one = data.clients[Number(place.dataset.clients)], bars = place.dataset.kind === "histogram";
      const [lines, more] = (bars ? clientsHistogram : clientsSpread)(one, dark() ? DARK_COLOURS : LIGHT_COLOURS);
      const legend = { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { color: css("--ink") } };
      show(place, lines, { showlegend: true, legend, ...more });
    }
  }

  function drawPartitions() {
    for (const place of document.querySelectorAll(".partition")) {
      const part = data.partitions[Number(place.dataset.place)];
      const scale = dark() ? [[0, "#1d2127"], [1, "#7cc0f5"]] : [[0, "#f3f6fa"], [1, "#08519c"]];
      const many = part.unit === "share";
      const trace = {
        type: "heatmap", z: part.z, colorscale: scale, zmin: 0, xgap: part.z[0].length <= 60 ? 1 : 0, ygap: 1,
        colorbar: { title: { text: part.unit, side: "right" }, thickness: 12, outlinewidth: 0 },
        hovertemplate: (many ? "" : "client %{x}, ") + "class %{y}: %{z:.4~g} " + part.unit + "<extra></extra>",
      };
      const more = {
        height: Math.min(520, Math.max(260, 120 + 16 * part.z.length)),
        xaxis: { title: { text: many ? "Clients, sorted" : "Client" }, showgrid: false, showticklabels: !many },
        yaxis: { title: { text: "Class" }, showgrid: false, dtick: part.z.length <= 20 ? 1 : undefined },
      };
      show(place, [trace], more);
    }
  }
})();
