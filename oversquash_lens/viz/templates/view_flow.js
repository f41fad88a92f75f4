// Views of a flow: the heads that carry it, the route it takes, and what each head brings to each token.
const MILLION = 1e6;

// A pattern's lower triangle, which comes row by row, as rows of shares with holes for what no path runs over:
// CircuitsVis draws no square for a hole, and most of a pattern is empty.
function square(flat, n) {
  return Array.from({ length: n }, (_, dest) => {
    const row = new Array(n);
    for (let src = 0; src <= dest; src++) {
      const number = flat[(dest * (dest + 1)) / 2 + src];
      if (number) row[src] = number / MILLION;
    }
    return row;
  });
}

// A head's heaviest edges in words: a pattern is a picture, which not everyone can see.
function inWords(view, matrix) {
  const name = (i) => `${view.places[i]} ${view.tokens[i].trim()}`;
  const edges = matrix.flatMap((row, dest) => row.map((share, src) => ({ share, dest, src })));
  return edges
    .sort((one, other) => other.share - one.share)
    .slice(0, 3)
    .map(({ share, dest, src }) => `${told(share)} from ${name(src)} to ${dest === src ? "itself" : name(dest)}`);
}

function drawHeads(view, stage) {
  const heads = view.columns.filter((name) => name.startsWith("head ")).length;
  const withPatterns = Object.keys(view.patterns).length > 0;
  const now = sayingLine();
  const patterns = element("div", "osl-patterns");
  const shown = {}; // layer -> what is drawn of it
  let picked = view.start;
  const label = (layer, column) => `layer ${layer}, ${view.columns[column]}: share ${told(view.table[layer][column])}`;
  const pick = (layer, column) => {
    picked = [layer, column];
    map.mark(layer, column);
    now.textContent = label(layer, column);
    if (!withPatterns) return;
    shown[layer] ??= layerPatterns(view, layer, patterns, (head) => pick(layer, head));
    Object.entries(shown).forEach(([other, made]) => (made.box.hidden = Number(other) !== layer));
    shown[layer].zoom(column < heads ? column : 0);
  };
  const pointed = (layer = picked[0], column = picked[1]) => (now.textContent = label(layer, column));
  const map = grid(view, { name: "Share of the paths that each head moves, by layer", label, pointed, pick });
  const left = element("div", "osl-map");
  const scroll = element("div");
  scroll.append(map.table);
  left.append(scroll, now);
  stage.append(left, ...(withPatterns ? [patterns] : []));
  pick(...view.start);
  ready(stage);
}

// CircuitsVis' AttentionHeads of one layer, with what draws the reader's eye to one head.
function layerPatterns(view, layer, place, picked) {
  const flat = view.patterns[layer];
  if (!flat) {
    const others = Object.keys(view.patterns).join(", ");
    const text = `The patterns of layer ${layer} are not in this view: it has those of layers ${others}.`;
    const box = element("p", "osl-none", text);
    place.append(box);
    return { box, zoom: () => {} };
  }
  const matrices = flat.map((head) => square(head, view.tokens.length));
  const coloured = (share) => cell("share " + told(share), shade(share, view.pattern_floor));
  const made = component("AttentionHeads", {
    tokens: view.tokens.map((token) => token.trim()),
    attention: matrices.map((matrix) => matrix.map((row) => row.map(coloured))),
    attentionHeadNames: flat.map((_, head) => `${head} \u00b7 ${told(100 * view.table[layer][head])} %`),
    minValue: -1,
    maxValue: 1,
    positiveColor: COLOR,
    maskUpperTri: false,
  });
  const box = element("div", "osl-pattern");
  const words = element("p", "osl-words");
  const key = element("div", "osl-edge-key", "share over an edge ");
  const keyPlace = element("span");
  key.append(keyPlace);
  box.append(key, made.box, words);
  place.append(box);
  showKey(keyPlace, view.pattern_key, view.pattern_floor);
  // The small pictures, which CircuitsVis makes to be clicked; it draws the clicked one large.
  const thumbs = new Promise((found) =>
    whenSeen(box, () => {
      made.draw();
      whenDrawn(made.box, "h2", () => {
        made.box.querySelectorAll("canvas").forEach((canvas) => canvas.setAttribute("aria-hidden", "true"));
        found([...made.box.querySelectorAll("h4")].map((title) => title.parentElement.parentElement));
      });
    }),
  );
  thumbs.then((all) =>
    all.forEach((thumb, head) => thumb.addEventListener("click", (event) => event.isTrusted && picked(head))),
  );
  const zoom = (head) => {
    const edges = inWords(view, matrices[head]).join("; ") || "none";
    words.textContent = `Layer ${layer}, head ${head}, heaviest edges: ${edges}.`;
    thumbs.then((all) => all[head].click());
  };
  return { box, zoom };
}

function drawRoute(view, stage) {
  const said = sayingLine();
  const moves = element("div", "osl-moves");
  const text = (layer, i) =>
    `layer ${layer}, ${view.places[i]} ${view.tokens[i].trim()}: ${inUnits(view, sharesOf(view, layer)[i])}`;
  const hint = "Point at the map, or walk it with the arrow keys, for the numbers; a click or Enter picks the layer.";
  const pointed = (layer, i) => (said.textContent = layer === undefined ? hint : text(layer, i));
  pointed();
  const pick = (layer) => pickLayer(layer);
  const map = overview(view, { name: "Map of layers and positions. " + hint, pointed, pick });
  stage.append(axes(view, map.box), said);
  if (view.heaviest.length) stage.append(heaviestMoves(view, pick));
  const pickLayer = drawStrip(view, stage, view.heaviest.length ? [moves] : [], (layer) => {
    map.mark(layer);
    const list = element("ul");
    const leaving = !view.moves[layer]; // behind the last layer nothing moves any more
    if (!leaving) list.append(...view.moves[layer].map((words) => element("li", "", words)));
    const stays = leaving ? "" : `Layer ${layer}: ${view.stays[layer]}. Most of what moves:`;
    moves.replaceChildren(element("p", "", stays), list);
  });
}

// A map with its layers named at the left and, below it, as many tokens as there is room for, the heaviest first.
function axes(view, map) {
  const rows = view.shares.length;
  const columns = view.tokens.length;
  const box = element("div", "osl-axes");
  const layers = element("div", "osl-layers");
  const every = Math.max(1, Math.round(rows / 6));
  for (let layer = 0; layer < rows; layer += every) {
    const tick = element("span", "", String(layer));
    tick.style.top = `${(100 * (rows - layer - 0.5)) / rows}%`;
    layers.append(tick);
  }
  const tokens = element("div", "osl-names");
  box.append(element("span", "osl-unit", "layer"), layers, map, tokens);
  box.setAttribute("aria-hidden", "false");
  layers.setAttribute("aria-hidden", "true");
  tokens.setAttribute("aria-hidden", "true");
  const largest = view.tokens.map((_, i) => Math.max(...view.shares.map((row) => Math.abs(row[i]) / view.widths[i])));
  const order = [...largest.keys()].sort((one, other) => largest[other] - largest[one]);
  const name = () => {
    const apart = (14 * columns) / (tokens.clientWidth || 1); // columns that a name is wide
    const named = [];
    for (const i of order) if (named.every((other) => Math.abs(other - i) >= apart)) named.push(i);
    tokens.replaceChildren(
      ...named.map((i) => {
        const made = element("span", "", view.tokens[i].trim());
        made.style.left = `${(100 * (i + 0.5)) / columns}%`;
        return made;
      }),
    );
  };
  new ResizeObserver(name).observe(tokens);
  return box;
}

// The heaviest moves of all layers, each a button that shows its layer.
function heaviestMoves(view, pick) {
  const box = element("div", "osl-moves");
  const list = element("ul");
  view.heaviest.forEach(([layer, words]) => {
    const button = Object.assign(element("button", "", `layer ${layer}: ${words}`), { type: "button" });
    button.addEventListener("click", () => pick(layer));
    const item = element("li");
    item.append(button);
    list.append(item);
  });
  box.append(element("p", "", "Heaviest moves of all layers:"), list);
  return box;
}

function drawActivations(view, stage) {
  const made = component("TextNeuronActivations", {
    tokens: view.tokens,
    activations: view.millionths,
    secondDimensionName: "Head",
    firstDimensionLabels: view.layers,
    secondDimensionLabels: view.heads,
  });
  stage.append(made.box);
  made.draw();
  whenDrawn(made.box, ".colored-tokens > span", () => {
    const selects = [...made.box.querySelectorAll("select")];
    // CircuitsVis gives every view's menus the same ids; a label must find its own.
    selects.forEach((select, i) => {
      const label = made.box.querySelector(`label[for="${select.id}"]`);
      select.id = label.htmlFor = uniqueName();
      select.value = String(view.start[i]);
      select.dispatchEvent(new Event("change", { bubbles: true }));
    });
    const colour = () => {
      const [layer, head] = selects.map((select) => Number(select.value));
      // React has drawn the picked head by now, blue and against its own largest value: here the scale is everyone's.
      made.box.querySelectorAll(".colored-tokens > span").forEach((span, i) => {
        const share = view.millionths[i][layer][head] / MILLION;
        const inner = span.firstElementChild;
        inner.style.backgroundColor = tint(shade(share / view.widths[i], view.floor));
        inner.style.color = "black";
        span.setAttribute("aria-label", `${view.tokens[i].trim()}, ${view.places[i]}: share ${told(share)}`);
      });
    };
    made.box.addEventListener("change", () => setTimeout(colour));
    setTimeout(() => {
      walkable(made.box, view.tokens);
      colour();
      ready(stage);
    });
  });
}
