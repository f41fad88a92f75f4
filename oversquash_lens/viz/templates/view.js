// What all views share. CircuitsVis' bundle stands above, in the same function.
const COLOR = "#f5a742"; // on white up to here black text keeps a contrast above 9
const NEGATIVE = "#62a8e8"; // of shares below 0
const STEPS = { ArrowLeft: [0, -1], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowDown: [1, 0] };

// Where a share stands on the colour scale: 0 at `floor` or below, 1 at share 1, logarithmic between; negative shares
// have the same below 0.
function shade(share, floor) {
  const size = Math.abs(share);
  return size > floor ? Math.sign(share) * Math.min(1, 1 - Math.log(size) / Math.log(floor)) : 0;
}

// The colour of a shade, as near to CircuitsVis' own mixing with white as the eye can tell.
function tint(shade) {
  const channels = [1, 3, 5].map((at) => parseInt((shade < 0 ? NEGATIVE : COLOR).slice(at, at + 2), 16));
  return `rgb(${channels.map((channel) => Math.round(255 - Math.abs(shade) * (255 - channel))).join(",")})`;
}

// CircuitsVis colours by arithmetic on a value and prints the same value in its hover box. An array of one string
// prints as that string, and what arithmetic sees of it is its valueOf.
function cell(text, number) {
  return Object.assign([text], { valueOf: () => number });
}

// Three digits, as people write them: 0.0412, and 4e-7 only where there is no other way.
function told(share) {
  return share === null ? "unknown" : String(Number(share.toPrecision(3)));
}

function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

function uniqueName() {
  return "osl-" + Math.random().toString(36).slice(2);
}

// A box and what draws a CircuitsVis component in it: CircuitsVis.render looks its element up in the document, so
// the caller attaches the box first.
function component(kind, props) {
  const box = element("div");
  const inner = element("div");
  inner.id = uniqueName();
  box.append(inner);
  return { box, draw: () => CircuitsVis.render(inner.id, CircuitsVis[kind], props) };
}

// What takes long to draw waits until the reader comes near it, or prints.
function whenSeen(box, draw) {
  const once = () => {
    seen.disconnect();
    removeEventListener("beforeprint", once);
    draw();
  };
  const seen = new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && once(), {
    rootMargin: "400px",
  });
  seen.observe(box);
  addEventListener("beforeprint", once);
}

// React draws a little later. Should it ever fail, this stops asking after ten seconds.
function whenDrawn(box, selector, action, tries = 1000) {
  if (box.querySelector(selector)) action();
  else if (tries) setTimeout(() => whenDrawn(box, selector, action, tries - 1), 10);
}

// CircuitsVis keeps activations in TensorFlow, which would ask for a graphics card to slice a few thousand numbers,
// and browsers without one would complain.
globalThis._tfengine?.removeBackend("webgl");

// The stage is drawn and may be read.
function ready(inside) {
  inside.closest(".osl-stage").setAttribute("aria-busy", "false");
}

// The line that says in words what is picked or pointed at.
function sayingLine() {
  const line = element("p", "osl-now");
  line.setAttribute("aria-live", "polite");
  return line;
}

// One button per layer, as native radio buttons: Tab reaches the row, arrow keys move in it. Pickers inside one
// .osl-together follow each other.
function picker(labels, show) {
  const row = element("fieldset");
  const name = uniqueName();
  row.append(element("legend", "", "layer"));
  labels.forEach((label, i) => {
    const button = element("label");
    const input = element("input");
    const text = element("span", "", String(i));
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
    text.setAttribute("aria-hidden", "true");
    button.title = label;
    button.append(input, text);
    row.append(button);
  });
  return row;
}
