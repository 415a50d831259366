// Cards of the experts of a layer, under a picture of who reads what
const showExperts = (data, explore) => {
  const layers = () => Object.keys(data.experts[$("me-run").value] || {});
  const colourOf = (e) => data.colours[e % data.colours.length];
  const names = Object.values(data.experts).flatMap((own) => Object.values(own)).flat()
    .flatMap((card) => card.domains.map(([name]) => name));
  const domains = [...new Set(names)];
  const ofDomain = (name) => data.colours[domains.indexOf(name) % data.colours.length];
  const listed = (shares) => shares.map(([name, share]) => `${name} ${percent(share)}`).join(", ");
  const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(3)}`;
  const mosaic = (run, layer) => {
    const figure = make("figure");
    figure.append(make("figcaption", `${Object.keys(data.experts).length > 1 ? `${run}, ` : ""}layer ${layer}: who reads what`));
    const row = make("div", undefined, "mosaic");
    const cards = data.experts[run][layer];
    cards.forEach((card) => {
      const column = make("a");
      column.href = `#expert-${card.expert}`;
      column.style.flexGrow = Math.max(card.load, 0.002);
      column.title = `expert ${card.expert}: load ${percent(card.load)}; ${listed(card.domains)}`;
      column.setAttribute("aria-label", column.title);
      column.addEventListener("click", () => { $("me-run").value = run; draw(); });
      card.domains.forEach(([name, share]) => {
        const part = coloured(make("span"), ofDomain(name));
        part.style.flexGrow = share;
        column.append(part);
      });
      if (cards.length <= 16) column.append(make("b", card.expert));
      row.append(column);
    });
    figure.append(row);
    return figure;
  };
  const passage = (own) => {
    const line = make("p", undefined, "passage");
    const text = [...own.text];
    let done = 0;
    const flat = (from, to) => text.slice(from, to).join("").replace(/\n/g, "⏎").replace(/\t/g, "⇥");
    own.spans.forEach(([from, to]) => {
      line.append(flat(done, from), make("mark", visible(text.slice(from, to).join(""))));
      done = to;
    });
    line.append(flat(done), make("small", ` (${own.domain}, ${own.own} of ${own.tokens} tokens)`));
    return line;
  };
  const heading = (card) => {
    const main = card.types.map((type) => type.name);
    if (!card.load) return "gets no token of this text";
    return main.length ? main.join(", ") : "no kind of token more than others";
  };
  const cardOf = (card, layer) => {
    const node = make("article", undefined, "card");
    node.id = `expert-${card.expert}`;
    const line = (label, text) => {
      const p = make("p");
      p.append(make("small", `${label}: `), text);
      node.append(p);
    };
    const title = make("h3");
    title.append(coloured(make("span", undefined, "dot"), colourOf(card.expert)), `Expert ${card.expert}`);
    node.append(title, make("p", heading(card), "kind"));
    const bar = make("div", undefined, "share");
    bar.setAttribute("role", "img");
    bar.setAttribute("aria-label", listed(card.domains));
    card.domains.forEach(([name, share]) => {
      const part = coloured(make("i"), ofDomain(name));
      part.style.flexGrow = share;
      bar.append(part);
    });
    const top = [...card.domains].sort((a, b) => b[1] - a[1]).filter(([, share]) => share >= 0.005);
    node.append(bar);
    line("domains", listed(top.slice(0, 4)) || "none");
    line("load", percent(card.load));
    if (card.types.length)
      line("token types", card.types.map((t) => `${t.name} ${percent(t.share)} (of all tokens ${percent(t.overall)})`).join(", "));
    if (card.tokens.length) {
      const chips = make("span", undefined, "chips");
      chips.append(...card.tokens.map((token) => make("code", visible(token))));
      line("its own tokens", chips);
    }
    if (card.passages.length) {
      node.append(make("p", "typical passages:", "note"));
      node.append(...card.passages.map(passage));
    }
    if (card.nearest) {
      const link = make("a", `expert ${card.nearest.expert}`);
      link.href = `#expert-${card.nearest.expert}`;
      const text = make("span");
      text.append(link, ` (cosine of ${card.nearest.kind} ${card.nearest.cosine.toFixed(2)})`);
      line("nearest", text);
    }
    if (card.damage)
      line("without it", `${signed(card.damage.all)} nats per token, most on ${card.damage.domain}: ${signed(card.damage.increase)} (${card.damage.how})`);
    if (explore) {
      const button = make("button", "Show in the explorer");
      button.type = "button";
      button.addEventListener("click", () => explore($("me-run").value, Number(layer), card.expert));
      node.append(button);
    }
    return node;
  };
  const draw = () => {
    fill($("me-layer"), layers());
    const layer = $("me-layer").value;
    const runs = Object.keys(data.experts).filter((run) => data.experts[run][layer]);
    $("me-map").replaceChildren(...runs.map((run) => mosaic(run, layer)));
    $("me-cards").replaceChildren(...(data.experts[$("me-run").value][layer] || []).map((card) => cardOf(card, layer)));
  };
  $("me-legend").replaceChildren(...domains.map((name) => {
    const item = make("li");
    item.append(coloured(make("span", undefined, "dot"), ofDomain(name)), name);
    return item;
  }));
  fill($("me-run"), Object.keys(data.experts).filter((run) => Object.keys(data.experts[run]).length));
  $("me-run").addEventListener("change", draw);
  $("me-layer").addEventListener("change", draw);
  draw();
};
