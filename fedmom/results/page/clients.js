// What is drawn of the clients' own results, [traces, layout]: `one` is a run, `spread` its own or its personal results.

function clientsSpread(one, inks) {
  const traces = one.spreads.flatMap((spread, at) => spreadTraces(spread, one, inks[at]));
  return [traces, { xaxis: { title: { text: "Rounds" }, tickformat: "d" }, yaxis: { ticksuffix: one.unit } }];
}

function clientsHistogram(one, inks) {
  const traces = one.spreads.flatMap((spread, at) => histogramTraces(spread, one, inks[at]));
  const xaxis = { title: { text: one.label }, ticksuffix: one.unit, ...(one.unit && { range: [-1, 101] }) };
  return [traces, { xaxis, yaxis: { title: { text: "Clients" } }, barmode: "overlay" }];
}

function clientsValue(one, name) {
  return one.unit ? `%{${name}:.1f}${one.unit}` : `%{${name}:.5~g}`;
}

function spreadTraces(spread, one, ink) {
  const x = spread.rounds, line = (name) => spread.lines[name].map((value) => value * one.factor);
  const [low, middle, high, worst] = ["q25", "median", "q75", "worst10"].map(line);
  const symbol = spread.whose === "own" ? "circle" : "square";
  const marker = { color: ink, symbol, size: 6, maxdisplayed: 14 };
  const hover = (name) => `${clientsValue(one, "y")} in round %{x}<extra>${spread.whose}: ${name}</extra>`;
  const alone = x.length === 1 && { // a band of one round has no width
    error_y: { type: "data", symmetric: false, array: [high[0] - middle[0]], arrayminus: [middle[0] - low[0]], width: 4 },
  };
  return [
    {
      x: [...x, ...x.toReversed()], y: [...high, ...low.toReversed()], mode: "lines", line: { width: 0 },
      fill: "toself", fillcolor: rgba(ink, 0.18), hoverinfo: "skip", showlegend: false, // the page says what it is
    },
    {
      x, y: middle, name: `${spread.whose}: median`, mode: "lines+markers", line: { color: ink, width: 1.8 }, marker,
      hovertemplate: hover("median"), ...alone,
    },
    {
      x, y: worst, name: `${spread.whose}: worst 10 %`, mode: "lines+markers", marker,
      line: { color: ink, width: 1.4, dash: "dash" }, hovertemplate: hover("worst 10 %"),
    },
  ];
}

// Own results as bars, personal ones as frames, so that both are seen where they overlap.
function histogramTraces(spread, one, ink) {
  if (!spread.histogram.counts) return [];
  const { low, high, counts } = spread.histogram, width = (high - low) / counts.length;
  const edges = counts.map((_, at) => one.factor * (low + at * width));
  const framed = spread.whose !== "own";
  return [{
    type: "bar", x: edges, y: counts, offset: 0, width: one.factor * width, name: spread.whose,
    marker: { color: rgba(ink, framed ? 0.08 : 0.55), line: { color: ink, width: framed ? 1.6 : 0 } },
    customdata: edges.map((edge) => edge + one.factor * width),
    hovertemplate:
      `%{y} clients from ${clientsValue(one, "x")} to ${clientsValue(one, "customdata")}<extra>${spread.whose}</extra>`,
  }];
}
