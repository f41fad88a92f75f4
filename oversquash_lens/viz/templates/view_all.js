// Draws every <figure class="osl-view"> and colour key that is not drawn yet.
const DRAW = { strip: drawStrip, route: drawRoute, heads: drawHeads, activations: drawActivations };

function drawFigure(figure) {
  const view = JSON.parse(figure.querySelector(":scope > script").textContent);
  const stage = figure.querySelector(".osl-stage");
  stage.textContent = "";
  stage.classList.add("osl-" + view.view);
  stage.setAttribute("aria-busy", "true");
  DRAW[view.view](view, stage);
}

// Drawn is remembered here and not in the document, so that a page saved by the browser draws itself anew.
const drawn = new WeakSet();

function drawAll() {
  for (const [selector, draw] of [[".osl-key", drawKey], [".osl-view", drawFigure]]) {
    for (const found of document.querySelectorAll(selector)) {
      if (drawn.has(found)) continue;
      drawn.add(found);
      draw(found);
    }
  }
}
