// Texts with every token in the colour of its expert; returns what shows an expert of a layer
const showExplorer = (data) => {
  const state = { run: 0, text: 0, layer: 0, slot: 0, expert: null, token: 0 };
  const run = () => data.explorer[state.run];
  const colourOf = (e) => data.colours[e % data.colours.length];
  const expertOf = (token) => run().texts[state.text].experts[state.layer][token][state.slot];
  const say = (token) => {
    const text = run().texts[state.text];
    const shares = text.probabilities[state.layer][token];
    const list = text.experts[state.layer][token].map((e, k) => `expert ${e}: ${(100 * shares[k]).toFixed(1)}%`).join(", ");
    $("ex-info").textContent = `${JSON.stringify(text.tokens[token])} (token ${token + 1}, layer ${run().layers[state.layer]}): ${list}`;
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
    const cards = (data.experts[run().name] || {})[layer] || [];
    const card = cards.find((one) => one.expert === state.expert);
    const chips = make("p", undefined, "chips");
    chips.append(...(card ? card.tokens : []).map((token) => make("code", visible(token))));
    $("ex-top").append(make("h3", `Expert ${state.expert}, layer ${layer}: ${count} of ${spans.length} tokens here`), chips);
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
    const numbered = run().num_experts > data.anyEye;
    $("ex-layer").max = run().layers.length - 1;
    $("ex-layer").value = state.layer;
    $("ex-layer").setAttribute("aria-valuetext", `layer ${run().layers[state.layer]}`);
    $("ex-layer-label").hidden = run().layers.length < 2;
    $("ex-layer-out").textContent = run().layers[state.layer];
    $("ex-tokens").replaceChildren(...text.tokens.map((token, i) => {
      const e = expertOf(i);
      const span = coloured(make("span", token || "▫", "tok"), colourOf(e));
      if (numbered) span.append(make("sub", e));
      span.setAttribute("role", "option");
      span.setAttribute("aria-label", `${token}, expert ${e}`);
      span.dataset.token = i;
      span.dataset.expert = e;
      span.tabIndex = -1;
      return span;
    }));
    $("ex-legend").replaceChildren(...Array.from({ length: run().num_experts }, (_, e) => {
      const button = coloured(make("button", e), colourOf(e));
      button.type = "button";
      button.dataset.expert = e;
      button.setAttribute("aria-label", `Expert ${e}`);
      return button;
    }));
    focusToken(state.token, false);
    showExpert();
  };
  const choose = (e) => { state.expert = state.expert === e ? null : e; showExpert(); };
  const tokenOf = (event) => event.target.closest(".tok");
  const over = (event) => { if (tokenOf(event)) say(Number(tokenOf(event).dataset.token)); };
  $("ex-tokens").addEventListener("mouseover", over);
  $("ex-tokens").addEventListener("focusin", over);
  $("ex-tokens").addEventListener("click", (event) => {
    if (!tokenOf(event)) return;
    focusToken(Number(tokenOf(event).dataset.token), true);
    choose(Number(tokenOf(event).dataset.expert));
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
  const start = (place) => {
    Object.assign(state, { run: place, text: 0, layer: 0, slot: 0, expert: null, token: 0 });
    $("ex-run").value = place;
    listTexts();
    $("ex-text").value = $("ex-slot").value = 0;
  };
  fill($("ex-run"), data.explorer.map((_, i) => i), data.explorer.map((one) => one.name));
  $("ex-run").addEventListener("change", () => { start(Number($("ex-run").value)); drawTokens(); });
  $("ex-text").addEventListener("change", () => { state.text = Number($("ex-text").value); state.token = 0; drawTokens(); });
  $("ex-slot").addEventListener("change", () => { state.slot = Number($("ex-slot").value); drawTokens(); });
  $("ex-layer").addEventListener("input", () => { state.layer = Number($("ex-layer").value); drawTokens(); });
  start(0);
  drawTokens();
  return (name, layer, expert) => {
    start(data.explorer.findIndex((one) => one.name === name));
    state.layer = run().layers.indexOf(layer);
    state.expert = expert;
    const counts = run().texts.map((text) => text.experts[state.layer].flat().filter((e) => e === expert).length);
    state.text = counts.indexOf(Math.max(...counts));
    $("ex-text").value = state.text;
    drawTokens();
    $("ex-legend").children[expert].focus({ preventScroll: true });
    $("s-explorer").scrollIntoView();
  };
};
