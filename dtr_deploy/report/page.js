"use strict";
for (const place of document.querySelectorAll(".plot")) {
  const figure = JSON.parse(document.getElementById(place.dataset.figure).textContent);
  if (window.innerWidth < 600 && figure.layout.grid === undefined) {
    // A phone: a legend above the plot would be taller than the plot.
    figure.layout.legend = { ...figure.layout.legend, y: -0.25, yanchor: "top" };
  }
  Plotly.newPlot(place, figure.data, figure.layout, { responsive: true, displayModeBar: false });
}
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details")) part.open = true;
  for (const place of document.querySelectorAll(".plot")) Plotly.Plots.resize(place);
});
