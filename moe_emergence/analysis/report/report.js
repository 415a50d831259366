"use strict";
(async () => {
  const $ = (id) => document.getElementById(id);
  const make = (tag, text, className) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (className) node.className = className;
    return node;
  };
  const fill = (select, names, labels) => {
    select.replaceChildren(...names.map((name, place) => {
      const option = make("option", labels ? labels[place] : name);
      option.value = name;
      return option;
    }));
  };
  const unpack = async (id) => {
    const raw = Uint8Array.from(atob($(id).textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([raw]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  };
  const numberTable = (head, rows) => {
    const table = make("table");
    const top = table.createTHead().insertRow();
    head.forEach((name) => { const th = make("th", name); th.scope = "col"; top.append(th); });
    const body = table.createTBody();
    rows.forEach((row) => {
      const line = body.insertRow();
      row.forEach((cell) => line.append(make("td", cell)));
    });
    return table;
  };

  const root = document.documentElement;
  const dark = () => root.dataset.theme === "dark";
  const redraws = [];
  const setTheme = (isDark) => {
    root.dataset.theme = isDark ? "dark" : "light";
    $("theme").setAttribute("aria-pressed", String(isDark));
    redraws.forEach((draw) => draw());
  };
  setTheme(window.matchMedia("(prefers-color-scheme: dark)").matches);
  $("theme").addEventListener("click", () => setTheme(!dark()));

  const data = JSON.parse(await unpack("payload-gz"));

  if (data.explorer.length) {
    const state = { run: 0, text: 0, layer: 0, slot: 0, expert: null, token: 0 };
    const run = () => data.explorer[state.run];
    const swatch = (e) => `color-mix(in srgb, ${data.colours[e % data.colours.length]} 38%, var(--card))`;
    const mark = (e) => `m${Math.floor(e / data.colours.length) % 4}`;
    const expertOf = (token) => run().texts[state.text].experts[state.layer][token][state.slot];
    const say = (token) => {
      const text = run().texts[state.text];
      const experts = text.experts[state.layer][token];
      const shares = text.probabilities[state.layer][token];
      const list = experts.map((e, k) => `expert ${e}: ${(100 * shares[k]).toFixed(1)}%`).join(", ");
      $("ex-info").textContent = `${JSON.stringify(text.tokens[token])} (token ${token + 1}, layer ${run().layers[state.layer]}) — ${list}`;
    };
    const showExpert = () => {
      const spans = $("ex-tokens").children;
      let count = 0;
      for (let i = 0; i < spans.length; i++) {
        const own = run().texts[state.text].experts[state.layer][i].includes(state.expert);
        count += own;
        spans[i].classList.toggle("hit", own);
        spans[i].classList.toggle("dim", state.expert !== null && !own);
      }
      for (const button of $("ex-legend").children)
        button.setAttribute("aria-pressed", String(Number(button.dataset.expert) === state.expert));
      $("ex-top").replaceChildren();
      if (state.expert === null) return;
      const layer = run().layers[state.layer];
      const top = data.vocabulary[`${run().name}|${layer}|${state.expert}`] || [];
      $("ex-top").append(
        make("h3", `Expert ${state.expert}, layer ${layer}: ${count} of ${spans.length} tokens here`),
        top.length
          ? numberTable(["top token", "times first", "of all its occurrences"],
              top.map(([token, times, share]) => [JSON.stringify(token), times, `${(100 * share).toFixed(0)}%`]))
          : make("p", "No token was seen often enough."));
    };
    const focusToken = (token, move) => {
      const spans = $("ex-tokens").children;
      if (!spans.length) return;
      spans[state.token] && (spans[state.token].tabIndex = -1);
      state.token = Math.max(0, Math.min(spans.length - 1, token));
      spans[state.token].tabIndex = 0;
      if (move) spans[state.token].focus();
    };
    const drawTokens = () => {
      const text = run().texts[state.text];
      $("ex-layer").max = run().layers.length - 1;
      $("ex-layer").value = state.layer;
      $("ex-layer").setAttribute("aria-valuetext", `layer ${run().layers[state.layer]}`);
      $("ex-layer-out").textContent = run().layers[state.layer];
      $("ex-slot-label").hidden = run().top_k < 2;
      $("ex-tokens").replaceChildren(...text.tokens.map((token, i) => {
        const e = expertOf(i);
        const span = make("span", token || "\u25ab", `tok ${mark(e)}`);
        span.style.setProperty("--swatch", swatch(e));
        span.setAttribute("role", "option");
        span.setAttribute("aria-label", `${token}, expert ${e}`);
        span.dataset.token = i;
        span.dataset.expert = e;
        span.tabIndex = -1;
        return span;
      }));
      $("ex-legend").replaceChildren(...Array.from({ length: run().num_experts }, (_, e) => {
        const button = make("button", `${e}`, mark(e));
        button.type = "button";
        button.dataset.expert = e;
        button.title = `Expert ${e}`;
        button.style.setProperty("--swatch", swatch(e));
        return button;
      }));
      focusToken(state.token, false);
      showExpert();
    };
    const choose = (e) => { state.expert = state.expert === e ? null : e; showExpert(); };
    const over = (event) => {
      const token = event.target.dataset.token;
      if (token !== undefined) say(Number(token));
    };
    $("ex-tokens").addEventListener("mouseover", over);
    $("ex-tokens").addEventListener("focusin", over);
    $("ex-tokens").addEventListener("click", (event) => {
      if (event.target.dataset.token === undefined) return;
      focusToken(Number(event.target.dataset.token), true);
      choose(Number(event.target.dataset.expert));
    });
    $("ex-tokens").addEventListener("keydown", (event) => {
      const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 };
      if (event.key in steps) { event.preventDefault(); focusToken(state.token + steps[event.key], true); }
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(expertOf(state.token)); }
    });
    $("ex-legend").addEventListener("click", (event) => {
      if (event.target.dataset.expert !== undefined) choose(Number(event.target.dataset.expert));
    });
    const listTexts = () => {
      fill($("ex-text"), run().texts.map((_, i) => i), run().texts.map((text) => text.title));
      fill($("ex-slot"), Array.from({ length: run().top_k }, (_, k) => k),
        Array.from({ length: run().top_k }, (_, k) => (k ? `${k + 1}.` : "most probable")));
    };
    fill($("ex-run"), data.explorer.map((_, i) => i), data.explorer.map((one) => one.name));
    $("ex-run").addEventListener("change", () => {
      Object.assign(state, { run: Number($("ex-run").value), text: 0, layer: 0, slot: 0, expert: null, token: 0 });
      listTexts();
      drawTokens();
    });
    $("ex-text").addEventListener("change", () => { state.text = Number($("ex-text").value); state.token = 0; drawTokens(); });
    $("ex-slot").addEventListener("change", () => { state.slot = Number($("ex-slot").value); drawTokens(); });
    $("ex-layer").addEventListener("input", () => { state.layer = Number($("ex-layer").value); drawTokens(); });
    listTexts();
    drawTokens();
  }

  performance.mark("text");
  const source = await unpack("plotly-gz");
  new Function(source).call(window);
  const paint = (layout) => {
    const colour = getComputedStyle(root).getPropertyValue("--fg").trim();
    const line = getComputedStyle(root).getPropertyValue("--line").trim();
    const axis = (own) => ({ ...own, gridcolor: line, linecolor: line, zerolinecolor: line });
    return { ...layout, autosize: true, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colour, family: "system-ui, sans-serif", size: 12 },
      xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis) };
  };
  const options = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"] };

  const metrics = Object.keys(data.heatmaps);
  if (metrics.length) {
    fill($("heat-metric"), metrics, metrics.map((name) => data.heatmaps[name].title));
    const unique = (values) => [...new Set(values)];
    const metric = () => data.heatmaps[$("heat-metric").value];
    let layers = [];
    const draw = () => {
      const views = metric().views.filter((v) => v.run === $("heat-run").value);
      layers = unique(views.map((v) => v.layer));
      $("heat-layer").max = layers.length - 1;
      const layer = layers[Math.min(Number($("heat-layer").value), layers.length - 1)];
      $("heat-layer-out").textContent = layer;
      $("heat-layer").setAttribute("aria-valuetext", `layer ${layer}`);
      const here = views.filter((v) => v.layer === layer);
      const panels = here.map((v) => v.panel);
      const before = $("heat-panel").value;
      fill($("heat-panel"), panels);
      if (panels.includes(before)) $("heat-panel").value = before;
      $("heat-panel-label").hidden = panels.length < 2;
      const view = here.find((v) => v.panel === $("heat-panel").value);
      const figure = metric().figure;
      const trace = { ...figure.data[0], z: view.z, x: view.columns, y: view.rows };
      if (!metric().signed) Object.assign(trace, { zmin: 0, zmax: Math.max(...view.z.flat()) || 1 });
      if (view.columns.length <= 16) trace.texttemplate = "%{z:.2f}";
      Plotly.react("heat", [trace], paint(figure.layout), options);
      $("heat-file").textContent = `tables/${metric().table}.csv`;
      $("heat-table").replaceChildren(numberTable([metric().rowTitle, ...view.columns],
        view.rows.map((row, i) => [row, ...view.z[i].map((v) => (v === null ? "" : v))])));
    };
    const listRuns = () => {
      const before = $("heat-run").value;
      const runs = unique(metric().views.map((v) => v.run));
      fill($("heat-run"), runs);
      if (runs.includes(before)) $("heat-run").value = before;
      draw();
    };
    $("heat-metric").addEventListener("change", listRuns);
    $("heat-run").addEventListener("change", draw);
    $("heat-layer").addEventListener("input", draw);
    $("heat-panel").addEventListener("change", draw);
    redraws.push(draw);
    listRuns();
  }

  const curves = Object.keys(data.curves);
  if (curves.length) {
    fill($("curve"), curves, curves.map((name) => data.curves[name].title));
    const draw = () => {
      const curve = data.curves[$("curve").value];
      Plotly.react("curves", curve.figure.data, paint(curve.figure.layout), options);
      $("curve-file").textContent = `tables/${curve.table}.csv`;
      $("curve-table").replaceChildren(numberTable(["line", "step", curve.unit],
        curve.figure.data.flatMap((line) => line.x.map((x, i) => [line.meta, x, line.y[i]]))));
    };
    $("curve").addEventListener("change", draw);
    redraws.push(draw);
    draw();
  }
  root.dataset.ready = "true";
  performance.mark("charts");
})();
