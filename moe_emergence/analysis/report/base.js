"use strict";
const $ = (id) => document.getElementById(id);
const make = (tag, text, className) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
};
const fill = (select, names, labels) => {
  const before = select.value;
  select.replaceChildren(...names.map((name, place) => {
    const option = make("option", labels ? labels[place] : name);
    option.value = name;
    return option;
  }));
  if (names.map(String).includes(before)) select.value = before;
  const label = $(`${select.id}-label`);
  if (label) label.hidden = names.length < 2;
};
const unpack = async (id) => {
  const raw = Uint8Array.from(atob($(id).textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([raw]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
};
const numberTable = (head, rows) => {
  const table = make("table", undefined, head.length > 10 ? "wide" : "fold");
  const top = table.createTHead().insertRow();
  head.forEach((name) => { const th = make("th", name); th.scope = "col"; top.append(th); });
  const body = table.createTBody();
  rows.forEach((row) => {
    const line = body.insertRow();
    row.forEach((cell, i) => {
      const node = make(i ? "td" : "th", cell);
      node.dataset.label = i ? head[i] : `${head[i]} `;
      if (!i) node.scope = "row";
      line.append(node);
    });
  });
  return table;
};
const percent = (share) => (share > 0 && share < 0.005 ? "<1%" : `${Math.round(100 * share)}%`);
const visible = (text) => text.replace(/ /g, "·").replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "▫";
const coloured = (node, colour) => { node.style.setProperty("--swatch", colour); return node; };

const root = document.documentElement;
const dark = () => root.dataset.theme === "dark";
const redraws = [];
const setTheme = (isDark) => {
  root.dataset.theme = isDark ? "dark" : "light";
  $("theme").textContent = isDark ? "Switch to light" : "Switch to dark";
  redraws.forEach((draw) => draw());
};
