"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 560px)");
  let printing = false;

  // A figure's own copy, in the colours of the screen that it is for.
  function recoloured(value) {
    if (typeof value === "string") {
      return dark.matches && !printing && data.dark[value] ? data.dark[value] : value;
    }
    if (Array.isArray(value)) return value.map(recoloured);
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, recoloured(v)]));
    }
    return value;
  }

  function chosenView(section, panel) {
    const choice = panel.selectors.map((options, i) => {
      const inputs = [...section.querySelectorAll(`[data-selector="${i}"]`)];
      if (!inputs.length) return options[0];
      return inputs[0].type === "radio" ? inputs.find((input) => input.checked).value : inputs[0].value;
    });
    return panel.views.find((view) => view.choice.every((option, i) => option === choice[i]));
  }

  function draw(section) {
    const view = chosenView(section, data.panels[section.dataset.panel]);
    const figure = recoloured(view.figure);
    const hidden = new Set(
      [...section.querySelectorAll('[aria-pressed="false"]')].map((button) => button.dataset.method)
    );
    for (const trace of figure.data) if (hidden.has(trace.legendgroup)) trace.visible = false;
    const { layout } = figure;
    if (printing) {
      layout.width = 680;
      if (layout.meta.may_shrink) layout.height = Math.min(layout.height, 300);
    } else if (narrow.matches) {
      layout.font.size = 11;
      layout.margin.r = 4;
      if (layout.meta.may_shrink) layout.height = Math.min(layout.height, 340);
    }
    const plot = section.querySelector(".plot");
    plot.style.height = `${layout.height}px`;
    section.querySelector(".says").textContent = view.says;
    return Plotly.react(plot, figure.data, layout, { displayModeBar: false, responsive: true })
      .then(() => { plot.dataset.drawn = "true"; });
  }

  const sections = [...document.querySelectorAll("[data-panel]")];
  const drawAll = () => sections.forEach(draw);
  for (const section of sections) {
    section.addEventListener("change", () => draw(section));
    section.addEventListener("click", (event) => {
      const button = event.target.closest("button[data-method]");
      if (!button) return;
      button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
      draw(section);
    });
  }
  dark.addEventListener("change", drawAll);
  narrow.addEventListener("change", drawAll);
  addEventListener("beforeprint", () => { printing = true; drawAll(); });
  addEventListener("afterprint", () => { printing = false; drawAll(); });
  drawAll();
})();
