// Tokens coloured by their shares, a row of them for each layer.

function strip(tokens, values) {
  const colours = { positiveColor: COLOR, negativeColor: NEGATIVE };
  return component("ColoredTokens", { tokens, values, minValue: -1, maxValue: 1, ...colours });
}

// null is what was not measured.
function sharesOf(view, layer) {
  return view.shares[layer].map((number) => (number === null ? null : number / view.parts));
}

function inUnits(view, share) {
  return share === null ? "not measured" : `${view.unit} ${share}`;
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
      const [down, right] = STEPS[event.key] ?? [NaN, NaN];
      const next = event.key === "Home" ? 0 : event.key === "End" ? cells.length - 1 : i + down + right;
      if (!cells[next]) return;
      event.preventDefault();
      span.tabIndex = -1;
      cells[next].tabIndex = 0;
      cells[next].focus();
    });
  });
}

// A long prompt at its true scale, from left to right: where on it colour lies. Its cells, with their numbers, stand
// below.
function ribbon(view) {
  const canvas = element("canvas", "osl-ribbon");
  Object.assign(canvas, { width: 1440, height: 24 });
  canvas.setAttribute("aria-hidden", "true");
  const pen = canvas.getContext("2d");
  const shades = view.inside.shares.map((share) => shade(share, view.floor));
  const place = (i) => Math.floor((i * canvas.width) / shades.length);
  // Where several tokens share a column of pixels, the darkest of them is seen: it is drawn last.
  const order = [...shades.keys()].sort((one, other) => shades[one] - shades[other]);
  for (const i of order) {
    pen.fillStyle = tint(shades[i]);
    pen.fillRect(place(i), 0, Math.max(1, place(i + 1) - place(i)), canvas.height);
  }
  return canvas;
}

// The bins of a long prompt open, one at a time, below the strip.
function openable(view, box, stage) {
  const inside = element("div", "osl-inside");
  inside.setAttribute("aria-live", "polite");
  stage.append(inside);
  let start = 0;
  [...box.querySelectorAll(".colored-tokens > span")].forEach((span, i) => {
    const from = start;
    const to = (start += view.widths[i]);
    if (to - from === 1) return;
    const open = () => {
      inside.replaceChildren(element("p", "osl-now", `Tokens ${from} to ${to - 1}, one by one:`));
      const shares = view.inside.shares.slice(from, to);
      const texts = shares.map((share, k) => `token ${from + k}: share ${share}`);
      const tokens = view.inside.tokens.slice(from, to);
      const made = strip(tokens, shares.map((share, k) => cell(texts[k], shade(share, view.floor))));
      inside.append(made.box);
      made.draw();
      whenDrawn(made.box, ".colored-tokens", () => walkable(made.box, texts.map((text, k) => tokens[k] + ", " + text)));
    };
    span.classList.add("osl-bin");
    span.setAttribute("role", "button");
    span.addEventListener("click", open);
    span.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      open();
    });
  });
}

// Draws the strips into `stage`, below `above`; `picked` hears which layer is shown. Returns what picks one.
function drawStrip(view, stage, above = [], picked = () => {}) {
  const strips = [];
  const now = sayingLine();
  let shown = 0;
  const show = (layer) => {
    shown = layer;
    now.textContent = view.notes[layer];
    picked(layer);
    if (!strips[layer]) {
      const shares = sharesOf(view, layer);
      const texts = shares.map((share, i) => `${view.places[i]}: ${inUnits(view, share)}`);
      // A bin's number is the sum of its tokens, its colour their mean, or bins would outshine single tokens.
      const values = shares.map((share, i) => cell(texts[i], shade(share / view.widths[i], view.floor)));
      const made = (strips[layer] = strip(view.tokens, values));
      stage.append(made.box);
      made.draw();
      whenDrawn(made.box, ".colored-tokens", () => {
        walkable(made.box, texts.map((text, i) => view.tokens[i] + ", " + text));
        if (view.inside) openable(view, made.box, stage);
        ready(stage);
      });
    }
    // The old strip stays until the new one is there, so that the page does not jump.
    whenDrawn(strips[layer].box, ".colored-tokens", () => strips.forEach((made, i) => (made.box.hidden = i !== shown)));
  };
  const buttons = view.labels.length > 1 ? picker(view.labels, show) : null;
  if (buttons) stage.append(buttons, now);
  if (view.inside) stage.append(ribbon(view));
  stage.append(...above);
  show(0);
  return (layer) => buttons.querySelector(`input[value="${layer}"]`).click();
}

function drawKey(key) {
  const { key: steps, floor } = JSON.parse(key.querySelector(":scope > script").textContent);
  showKey(key.querySelector(":scope > span"), steps, floor);
}

function showKey(place, steps, floor) {
  const made = strip(
    steps.map(([text]) => text),
    steps.map(([text, share]) => cell(text, shade(share, floor))),
  );
  place.replaceChildren(made.box);
  made.draw();
}
