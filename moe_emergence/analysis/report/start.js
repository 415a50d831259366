(async () => {
  setTheme(window.matchMedia("(prefers-color-scheme: dark)").matches);
  $("theme").addEventListener("click", () => setTheme(!dark()));
  const data = JSON.parse(await unpack("payload-gz"));
  const explore = data.explorer.length ? showExplorer(data) : null;
  if ($("me-cards")) showExperts(data, explore);
  performance.mark("text");
  new Function(await unpack("plotly-gz")).call(window);
  if (Object.keys(data.heatmaps).length) showHeatmaps(data);
  if (Object.keys(data.curves).length) showCurves(data);
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (width === window.innerWidth) return; // a phone's address bar changes the height alone
    width = window.innerWidth;
    redraws.forEach((draw) => draw());
  });
  root.dataset.ready = "true";
  performance.mark("charts");
})();
