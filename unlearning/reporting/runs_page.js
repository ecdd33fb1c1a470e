// Sorting and filters. All state is in the address after #, so that a view can be sent as a link:
//   #concept=cat&method=esd_x,uce&sort=-retention/acc_s
"use strict";

const form = document.querySelector(".filters");
const boxes = [...form.querySelectorAll("[name=method]")];
const selects = [...form.querySelectorAll("select")];
const all = (selector, within = document) => [...within.querySelectorAll(selector)];

function read() {
  const address = new URLSearchParams(location.hash.slice(1));
  const named = address.get("method");
  const state = { methods: new Set(named === null ? boxes.map((b) => b.value) : named.split(",")), sort: address.get("sort") || "" };
  for (const kind of ["concept", "model", "dataset"]) state[kind] = address.get(kind) || "";
  return state;
}

function write(state) {
  const address = new URLSearchParams();
  for (const kind of ["concept", "model", "dataset"]) if (state[kind]) address.set(kind, state[kind]);
  if (state.methods.size < boxes.length) address.set("method", [...state.methods].join(","));
  if (state.sort) address.set("sort", state.sort);
  const hash = address.toString().replaceAll("%2F", "/").replaceAll("%2C", ",");
  history.replaceState(null, "", hash ? "#" + hash : location.pathname + location.search);
  show(state);
}

// --- what is shown ---------------------------------------------------------------------------------------------------

function show(state) {
  for (const box of boxes) box.checked = state.methods.has(box.value);
  for (const select of selects) select.value = state[select.name];
  for (const world of all(".world")) {
    const scopes = all(".scope", world);
    const single = scopes.filter((s) => s.dataset.concept);
    for (const scope of scopes) {
      const own = scope.dataset.concept;
      scope.hidden = state.concept !== "" && own !== state.concept;
      scope.classList.toggle("brief", state.concept === "" && own !== "" && single.length > 1);
    }
    const elsewhere = ["model", "dataset"].some((kind) => state[kind] && state[kind] !== world.dataset[kind]);
    world.hidden = elsewhere || scopes.every((scope) => scope.hidden);
  }
  for (const line of all("polyline")) line.toggleAttribute("hidden", state.concept !== "" && line.dataset.concept !== state.concept);
  for (const part of all("[data-method]:not(.name)")) part.toggleAttribute("hidden", !state.methods.has(part.dataset.method));
  for (const plot of all(".plot")) drawFront(plot);
  document.querySelector(".nothing").hidden = all(".world").some((world) => !world.hidden);
  sort(state.sort);
}

// The front of what is shown, by the rule of plots.py: a staircase along the points that no other point beats.
function drawFront(plot) {
  const points = all(".point:not(.aside):not([hidden])", plot).map((p) => [Number(p.dataset.x), Number(p.dataset.y)]);
  const beaten = ([x, y]) => points.some(([a, b]) => a >= x && b >= y && (a > x || b > y));
  const front = points.filter((point) => !beaten(point)).sort((a, b) => a[0] - b[0] || a[1] - b[1]);
  const corners = front.flatMap(([x, y], i) => (i ? [[front[i - 1][0], y], [x, y]] : [[0, y], [x, y]]));
  if (front.length) corners.push([front.at(-1)[0], 0]);
  const lines = corners.slice(1).map(([x, y], i) => {
    const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
    const ends = { x1: corners[i][0], y1: 100 - corners[i][1], x2: x, y2: 100 - y };
    for (const [name, value] of Object.entries(ends)) line.setAttribute(name, value + "%");
    return line;
  });
  plot.querySelector(".front").replaceChildren(...lines);
}

// --- sorting ---------------------------------------------------------------------------------------------------------

// "retention/acc_s" sorts up, "-retention/acc_s" down, "" as the page came. The model before stays on top.
function sort(order) {
  const down = order.startsWith("-");
  const name = down ? order.slice(1) : order;
  for (const table of all(".numbers")) {
    const heads = all("[data-sort]", table);
    const column = heads.findIndex((head) => head.dataset.sort === name);
    heads.forEach((head, i) => head.setAttribute("aria-sort", i !== column ? "none" : down ? "descending" : "ascending"));
    const body = table.tBodies[0];
    const rows = [...body.rows];
    rows.forEach((row, i) => (row.dataset.place ??= i));
    const value = (row) => (column < 0 ? row.dataset.place : row.cells[column].dataset.value);
    const compare = (a, b) => {
      const pinned = ("before" in b.dataset) - ("before" in a.dataset);
      if (pinned) return pinned;
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === ""); // what was not measured stands last
      const difference = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return (down ? -difference : difference) || a.dataset.place - b.dataset.place;
    };
    body.append(...rows.sort(compare));
  }
}

// --- what people do --------------------------------------------------------------------------------------------------

form.addEventListener("change", () => {
  const state = read();
  state.methods = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
  for (const select of selects) state[select.name] = select.value;
  write(state);
});
form.addEventListener("reset", (event) => {
  event.preventDefault();
  write({ methods: new Set(boxes.map((box) => box.value)), sort: "", concept: "", model: "", dataset: "" });
});
form.addEventListener("submit", (event) => event.preventDefault());
addEventListener("hashchange", () => show(read()));
document.addEventListener("click", (event) => {
  const head = event.target.closest?.(".numbers button")?.closest("[data-sort]");
  if (!head) return;
  // The best first: where more is better, and in a column of words the other way round. Then back, then as it came.
  const name = head.dataset.sort;
  const [first, second] = "higher" in head.dataset ? ["-" + name, name] : [name, "-" + name];
  const state = read();
  state.sort = { [first]: second, [second]: "" }[state.sort] ?? first;
  write(state);
});

for (const point of all(".point")) {
  const tip = point.closest(".frame").querySelector(".tip");
  const text = point.querySelector("title").textContent;
  point.querySelector("title").remove();
  const open = () => {
    tip.textContent = text.replace(": ", "\n").replace(", ", "\n");
    tip.style.left = Math.min(85, Math.max(15, point.dataset.x)) + "%";
    tip.style.top = 100 - point.dataset.y + "%";
    tip.hidden = false;
  };
  const close = () => (tip.hidden = true);
  for (const event of ["pointerenter", "focus"]) point.addEventListener(event, open);
  for (const event of ["pointerleave", "blur"]) point.addEventListener(event, close);
}

show(read());
