// Maps of layers by something, the first layer at the bottom, walked with the arrow keys.

// Arrow keys, Home and End inside `rows` by `columns`; undefined for every other key.
function walked(key, [row, column], rows, columns) {
  if (key === "Home") return [row, 0];
  if (key === "End") return [row, columns - 1];
  const step = STEPS[key];
  const within = (i, count) => Math.min(Math.max(i, 0), count - 1);
  return step && [within(row + step[0], rows), within(column + step[1], columns)];
}

// One cell per head and one for what stays: a table that screen readers know as a grid. `label(layer, column)` says a
// cell's number; `pointed(layer, column)` hears which one the reader looks at, or of none; `pick` which one is chosen.
function grid(view, { name, label, pointed, pick }) {
  const table = element("table", "osl-grid");
  table.setAttribute("role", "grid");
  table.setAttribute("aria-label", name);
  const last = view.table.length - 1;
  const heading = table.createTHead().insertRow();
  ["layer", ...view.columns].forEach((text, i) => {
    const short = text.replace(/^(head|what) /, "");
    const made = Object.assign(element("th", "", short), { scope: "col", title: text });
    made.setAttribute("aria-label", text);
    heading.append(made);
  });
  const body = table.createTBody();
  const cells = []; // by layer
  for (let layer = last; layer >= 0; layer--) {
    const row = body.insertRow();
    row.append(Object.assign(element("th", "", String(layer)), { scope: "row" }));
    cells[layer] = view.table[layer].map((share, column) => {
      const made = row.insertCell();
      made.setAttribute("role", "gridcell");
      made.setAttribute("aria-label", label(layer, column));
      made.tabIndex = -1;
      made.style.backgroundColor = tint(shade(share, view.floor));
      return made;
    });
  }
  const placeOf = (target) => {
    const found = target.closest("td");
    return found && [last - found.parentElement.sectionRowIndex, found.cellIndex - 1];
  };
  const on = (event, act) => table.addEventListener(event, (sent) => act(sent, placeOf(sent.target)));
  on("pointerover", (_, at) => at && pointed(...at));
  on("focusin", (_, at) => at && pointed(...at));
  on("pointerleave", () => pointed());
  on("focusout", () => pointed());
  on("click", (_, at) => at && pick(...at));
  on("keydown", (event, at) => {
    if (!at) return;
    if (event.key === "Enter" || event.key === " ") pick(...at);
    else {
      const next = walked(event.key, [last - at[0], at[1]], last + 1, view.columns.length);
      if (!next) return;
      cells[last - next[0]][next[1]].focus();
    }
    event.preventDefault();
  });
  const mark = (layer, column) => {
    cells.flat().forEach((made) => {
      made.tabIndex = -1; // the picked cell is the one stop for the Tab key
      made.setAttribute("aria-selected", "false");
    });
    cells[layer][column].tabIndex = 0;
    cells[layer][column].setAttribute("aria-selected", "true");
  };
  return { table, mark };
}

// Layers by cells of tokens as one small picture. `pointed` and `pick` as of a grid.
function overview(view, { name, pointed, pick }) {
  const rows = view.shares.length;
  const columns = view.tokens.length;
  const box = element("div", "osl-overview");
  box.tabIndex = 0;
  box.setAttribute("role", "application");
  box.setAttribute("aria-label", name);
  const canvas = element("canvas");
  const size = Math.max(1, Math.floor(1440 / columns)); // of one cell, so that it stays sharp
  Object.assign(canvas, { width: columns * size, height: rows * 8 });
  const pen = canvas.getContext("2d");
  view.shares.forEach((_, layer) =>
    sharesOf(view, layer).forEach((share, i) => {
      pen.fillStyle = tint(shade(share / view.widths[i], view.floor));
      pen.fillRect(i * size, (rows - 1 - layer) * 8, size, 8);
    }),
  );
  const rowMark = element("div", "osl-row-mark");
  const cellMark = element("div", "osl-cell-mark");
  box.append(canvas, rowMark, cellMark);
  const place = (mark, row) => Object.assign(mark.style, { top: `${(100 * row) / rows}%`, height: `${100 / rows}%` });

  let at = [rows - 1, 0]; // display row, column
  const point = (next) => {
    at = next;
    place(cellMark, at[0]);
    Object.assign(cellMark.style, { left: `${(100 * at[1]) / columns}%`, width: `${100 / columns}%` });
    cellMark.hidden = false;
    pointed(rows - 1 - at[0], at[1]);
  };
  const under = ({ clientX, clientY }) => {
    const { left, top, width, height } = canvas.getBoundingClientRect();
    const within = (part, count) => Math.min(Math.max(Math.floor(part * count), 0), count - 1);
    return [within((clientY - top) / height, rows), within((clientX - left) / width, columns)];
  };
  const leave = () => {
    cellMark.hidden = true;
    pointed();
  };
  cellMark.hidden = true;
  box.addEventListener("pointermove", (event) => point(under(event)));
  box.addEventListener("pointerleave", leave);
  box.addEventListener("blur", leave);
  box.addEventListener("focus", () => point(at));
  box.addEventListener("click", (event) => {
    point(under(event));
    pick(rows - 1 - at[0]);
  });
  box.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") pick(rows - 1 - at[0]);
    else {
      const next = walked(event.key, at, rows, columns);
      if (!next) return;
      point(next);
    }
    event.preventDefault();
  });
  return { box, mark: (layer) => place(rowMark, rows - 1 - layer) };
}
