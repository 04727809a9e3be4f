"use strict";
for (const place of document.querySelectorAll(".plot")) {
  const figure = JSON.parse(document.getElementById(place.dataset.figure).textContent);
  Plotly.newPlot(place, figure.data, figure.layout, { responsive: true, displayModeBar: false });
}
// Where plotly measures texts: nothing to read.
document.getElementById("js-plotly-tester")?.setAttribute("aria-hidden", "true");
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details")) part.open = true;
  for (const place of document.querySelectorAll(".plot")) Plotly.Plots.resize(place);
});
