// Draws every <figure class="osl-view"> that is not drawn yet. CircuitsVis' bundle stands above, in the same function.
const COLOR = "#f5a742"; // on white up to here black text keeps a contrast above 9
const ARROWS = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 };

// Where a share stands on the colour scale: 0 at `floor` or below, 1 at share 1, logarithmic between.
function shade(share, floor) {
  return share > floor ? 1 - Math.log(share) / Math.log(floor) : 0;
}

// CircuitsVis colours by arithmetic on a value and prints the same value in its hover box. An array of one string
// prints as that string, and what arithmetic sees of it is its valueOf.
function cell(text, number) {
  return Object.assign([text], { valueOf: () => number });
}

function strip(tokens, values) {
  const box = document.createElement("div");
  const inner = document.createElement("div");
  inner.id = "osl-" + Math.random().toString(36).slice(2);
  box.append(inner);
  const props = { tokens, values, minValue: -1, maxValue: 1, positiveColor: COLOR };
  // CircuitsVis.render looks its element up in the document, so the caller attaches the box first.
  return { box, draw: () => CircuitsVis.render(inner.id, CircuitsVis.ColoredTokens, props) };
}

// A strip is one stop for the Tab key; arrow keys walk its tokens and open their hover boxes.
function walkable(box, labels) {
  const cells = [...box.querySelectorAll(".colored-tokens > span")];
  cells.forEach((span, i) => {
    span.tabIndex = i ? -1 : 0;
    span.setAttribute("role", "img");
    span.setAttribute("aria-label", labels[i]);
    span.addEventListener("focus", () => {
      const at = span.getBoundingClientRect();
      span.dispatchEvent(new MouseEvent("mouseenter"));
      span.dispatchEvent(new MouseEvent("mousemove", { clientX: at.left + at.width / 2, clientY: at.bottom - 8 }));
    });
    span.addEventListener("blur", () => span.dispatchEvent(new MouseEvent("mouseleave")));
    span.addEventListener("keydown", (event) => {
      const step = ARROWS[event.key];
      const next = event.key === "Home" ? 0 : event.key === "End" ? cells.length - 1 : step && i + step;
      if (next === undefined || !cells[next]) return;
      event.preventDefault();
      span.tabIndex = -1;
      cells[next].tabIndex = 0;
      cells[next].focus();
    });
  });
}

// React draws a little later. Should it ever fail, this stops asking after ten seconds.
function whenDrawn(box, action, tries = 1000) {
  if (box.querySelector(".colored-tokens")) action();
  else if (tries) setTimeout(() => whenDrawn(box, action, tries - 1), 10);
}

// One button per layer, as native radio buttons: Tab reaches the row, arrow keys move in it. Pickers inside one
// .osl-together follow each other.
function picker(view, show) {
  const row = document.createElement("fieldset");
  const name = "osl-" + Math.random().toString(36).slice(2);
  const legend = document.createElement("legend");
  legend.textContent = "layer";
  row.append(legend);
  view.labels.forEach((label, i) => {
    const button = document.createElement("label");
    const input = document.createElement("input");
    const text = document.createElement("span");
    Object.assign(input, { type: "radio", name, checked: i === 0, value: String(i) });
    input.setAttribute("aria-label", label);
    input.addEventListener("change", () => {
      const together = row.closest(".osl-together");
      const others = together ? together.querySelectorAll(`input[type="radio"][value="${i}"]`) : [input];
      others.forEach((other) => {
        other.checked = true;
        other.dispatchEvent(new Event("osl-pick"));
      });
    });
    input.addEventListener("osl-pick", () => show(i));
    text.textContent = String(i);
    text.setAttribute("aria-hidden", "true");
    button.title = label;
    button.append(input, text);
    row.append(button);
  });
  return row;
}

function drawFigure(figure) {
  const view = JSON.parse(figure.querySelector(":scope > script").textContent);
  const stage = figure.querySelector(".osl-stage");
  const strips = [];
  stage.textContent = "";
  const now = document.createElement("p");
  now.className = "osl-now";
  now.setAttribute("aria-live", "polite");

  let shown = 0;
  const show = (layer) => {
    shown = layer;
    now.textContent = view.notes[layer];
    if (!strips[layer]) {
      const texts = view.shares[layer].map((share, i) => view.places[i] + ": share " + share);
      // A bin's number is the sum of its tokens, its colour their mean, or bins would outshine single tokens.
      const values = view.shares[layer].map((share, i) => cell(texts[i], shade(share / view.widths[i], view.floor)));
      const made = (strips[layer] = strip(view.tokens, values));
      stage.append(made.box);
      made.draw();
      whenDrawn(made.box, () => walkable(made.box, texts.map((text, i) => view.tokens[i] + ", " + text)));
    }
    // The old strip stays until the new one is there, so that the page does not jump.
    whenDrawn(strips[layer].box, () => strips.forEach((made, i) => (made.box.hidden = i !== shown)));
  };
  if (view.labels.length > 1) stage.append(picker(view, show), now);
  show(0);
}

function drawKey(key) {
  const { key: steps, floor } = JSON.parse(key.querySelector(":scope > script").textContent);
  const made = strip(
    steps.map(([text]) => text),
    steps.map(([text, share]) => cell(text, shade(share, floor))),
  );
  key.querySelector(":scope > span").replaceChildren(made.box);
  made.draw();
}

// Drawn is remembered here and not in the document, so that a page saved by the browser draws itself anew.
const drawn = new WeakSet();

function drawAll() {
  for (const [selector, draw] of [[".osl-key", drawKey], [".osl-view", drawFigure]]) {
    for (const element of document.querySelectorAll(selector)) {
      if (drawn.has(element)) continue;
      drawn.add(element);
      draw(element);
    }
  }
}
