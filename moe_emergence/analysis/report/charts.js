// Plotly reads its labels as a little HTML
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const DASHES = ["solid", "dash", "dot", "dashdot"];
const OPTIONS = { displayModeBar: false };
const narrow = () => window.innerWidth < 640;
// Lines of at most 14 characters on a phone, so that no name takes the picture's room
const wrapped = (text) => {
  if (!narrow()) return plain(text);
  const lines = [""];
  text.split(" ").flatMap((word) => word.match(/.{1,14}/gsu) || [""]).forEach((word) => {
    if (lines.at(-1).length + word.length > 13 && lines.at(-1)) lines.push(word);
    else lines[lines.length - 1] += `${lines.at(-1) ? " " : ""}${word}`;
  });
  return lines.map(plain).join("<br>");
};

const layoutOf = (id, x, y) => {
  const style = getComputedStyle(root);
  const line = style.getPropertyValue("--line").trim();
  const axis = (own) => ({ automargin: true, gridcolor: line, linecolor: line, zerolinecolor: line, ...own });
  return {
    width: $(id).clientWidth, height: $(id).clientHeight, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: style.getPropertyValue("--fg").trim(), family: "system-ui, sans-serif", size: 12 },
    margin: { l: 10, r: 10, t: 16, b: 44 }, hovermode: "closest",
    xaxis: axis(x), yaxis: axis(y),
  };
};

const showHeatmaps = (data) => {
  const metrics = Object.keys(data.heatmaps);
  fill($("heat-metric"), metrics, metrics.map((name) => data.heatmaps[name].title));
  const unique = (values) => [...new Set(values)];
  const metric = () => data.heatmaps[$("heat-metric").value];
  const colours = (scale, values) => {
    const most = Math.max(...values), least = Math.min(...values);
    const reach = Math.max(Math.abs(most), Math.abs(least)) || 1;
    if (scale === "signed") return { colorscale: PUOR, zmin: -reach, zmax: reach };
    return { colorscale: "Cividis", zmin: scale === "range" ? least : 0, zmax: most === least ? most + 1e-6 : most };
  };
  const draw = () => {
    const views = metric().views.filter((v) => v.run === $("heat-run").value);
    const layers = unique(views.map((v) => v.layer));
    $("heat-layer-label").hidden = layers.length < 2;
    $("heat-layer").max = layers.length - 1;
    const layer = layers[Math.min(Number($("heat-layer").value), layers.length - 1)];
    $("heat-layer-out").textContent = layer;
    $("heat-layer").setAttribute("aria-valuetext", `layer ${layer}`);
    const here = views.filter((v) => v.layer === layer);
    fill($("heat-panel"), here.map((v) => v.panel));
    const view = here.find((v) => v.panel === $("heat-panel").value);
    const { rowTitle, columnTitle, unit } = metric();
    const values = view.z.flat().filter((v) => v !== null);
    const room = ($("heat").clientWidth - (narrow() ? 130 : 300)) / view.columns.length;
    const digits = Math.max(...values.map(Math.abs)) < 0.1 ? 3 : 2;
    const trace = {
      type: "heatmap", z: view.z, x: view.columns.map(wrapped), y: view.rows.map(wrapped), xgap: view.columns.length > 16 ? 0 : 1, ygap: view.rows.length > 32 ? 0 : 1,
      ...colours(metric().scale, values), customdata: view.rows.map((name) => view.columns.map(() => plain(name))),
      texttemplate: room >= 40 ? `%{z:.${digits}f}` : "", hoverongaps: false,
      colorbar: narrow() ? { orientation: "h", y: 1, yanchor: "bottom", x: 0.5, len: 1, thickness: 10, nticks: 4 } : { thickness: 14 },
      hovertemplate: `${rowTitle} %{customdata}<br>${columnTitle} %{x}<br>%{z:.4f} ${unit}<extra></extra>`,
    };
    $("heat").style.height = `${Math.max(20, Math.min(56, 8 + (narrow() ? 2.1 : 1.7) * view.rows.length))}rem`;
    $("heat-about").textContent = `${metric().about} Colours: ${unit}.`;
    Plotly.react("heat", [trace], layoutOf("heat",
      { type: "category", showgrid: false, title: { text: columnTitle, standoff: 6 } },
      { type: "category", showgrid: false, autorange: "reversed", title: { text: rowTitle, standoff: 6 } }), OPTIONS);
    $("heat-file").textContent = `tables/${metric().table}.csv`;
    $("heat-table").replaceChildren(numberTable([rowTitle, ...view.columns],
      view.rows.map((row, i) => [row, ...view.z[i].map((v) => (v === null ? "" : v))])));
  };
  const listRuns = () => { fill($("heat-run"), unique(metric().views.map((v) => v.run))); draw(); };
  $("heat-metric").addEventListener("change", listRuns);
  $("heat-run").addEventListener("change", draw);
  $("heat-layer").addEventListener("input", draw);
  $("heat-panel").addEventListener("change", draw);
  redraws.push(draw);
  listRuns();
};
// ColorBrewer's, orange above 0: any eye can tell the two sides apart
const PUOR = [[0, "#542788"], [0.25, "#998ec3"], [0.5, "#f7f7f7"], [0.75, "#f1a340"], [1, "#b35806"]];

const showCurves = (data) => {
  const curves = Object.keys(data.curves);
  fill($("curve"), curves, curves.map((name) => data.curves[name].title));
  const curve = () => data.curves[$("curve").value];
  const draw = () => {
    fill($("curve-view"), curve().views.map((_, i) => i), curve().views.map((view) => view.name));
    const { lines } = curve().views[Number($("curve-view").value)];
    const runs = [...new Set(lines.map((line) => line.run))];
    const labels = [...new Set(lines.map((line) => line.label))];
    const traces = lines.map((line) => ({
      type: "scatter", mode: line.x.length < 12 ? "lines+markers" : "lines",
      x: line.x, y: line.y, name: plain(line.name),
      line: {
        color: data.colours[(line.expert ?? labels.indexOf(line.label)) % data.colours.length],
        dash: DASHES[runs.indexOf(line.run) % DASHES.length], width: 2,
      },
    }));
    const rows = narrow() ? Math.ceil(lines.length / 3) : 0;
    $("curves").style.height = `${26 + 1.2 * Math.min(rows, 12)}rem`;
    $("curve-about").textContent = `${curve().about} Height: ${curve().unit}.`;
    const layout = layoutOf("curves", { title: { text: "training step", standoff: 6 }, nticks: narrow() ? 5 : 10 }, { nticks: 6 });
    layout.showlegend = true;
    if (narrow()) layout.legend = { orientation: "h", y: -0.25, yanchor: "top", x: 0 };
    Plotly.react("curves", traces, layout, OPTIONS);
    $("curve-file").textContent = `tables/${curve().table}.csv`;
    $("curve-table").replaceChildren(numberTable(["line", "step", curve().unit],
      lines.flatMap((line) => line.x.map((x, i) => [line.name, x, line.y[i]]))));
  };
  $("curve").addEventListener("change", () => { $("curve-view").value = 0; draw(); });
  $("curve-view").addEventListener("change", draw);
  redraws.push(draw);
  draw();
};
