// Charts of curves over tokens, in SVG: lines with bands and dots, or stacked areas.

const WIDTH = 340, HEIGHT = 190, LEFT = 44, RIGHT = 8, TOP = 8, BOTTOM = 24;
const PLOT_WIDTH = WIDTH - LEFT - RIGHT, PLOT_HEIGHT = HEIGHT - TOP - BOTTOM;

// Round numbers inside a range, for the lines of a grid.
function ticks(low, high, n) {
  const rough = (high - low) / n, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5, 10].find((factor) => factor * power >= rough) ?? 10);
  const first = Math.ceil(low / step - 1e-9), count = Math.floor(high / step + 1e-9) - first;
  return Array.from({ length: count + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

const median = (values) => [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)];

// The range of values that a panel shows, without spikes: as agents.evaluation.curves.shown_range, which has the reasons.
function shownRange(curves) {
  const values = curves.flat();
  if (!values.length) return null;
  const medians = curves.flatMap((curve) =>
    curve.length < 3 ? curve : curve.map((_, i) => median(curve.slice(Math.max(0, i - 2), i + 3))));
  const [low, high] = extent(medians);
  const distances = values.map((value, i) => Math.abs(value - medians[i])).sort((a, b) => a - b);
  const reach = 2 * (high - low + 2 * distances[Math.floor(0.75 * (distances.length - 1))]);
  const near = values.filter((value) => value >= low - reach && value <= high + reach);
  return extent(new Set(near).size < 2 ? values : near);
}

function extent(values) {
  let low = Infinity, high = -Infinity;  // Math.min(...values) has a limit on its arguments
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}

const pairs = (curve) => curve.x.map((x, i) => [x, curve.y[i], i]).filter(([, y]) => y !== null && y !== undefined);

// A panel: title, chart, reading of the point under the pointer, and names that hide or show their curves.
// Curves have `name`, `color` (a number), `x`, `y`, and perhaps `dots`, `low` and `high` (a band or bars). `unit` is the
// word for x.
function panel(id, title, curves, stacked = false, unit = "tokens") {
  const card = element("figure", "card panel");
  card.dataset.panel = id;
  const reading = element("div", "reading");
  const names = element("div", "names");
  const draw = () => {
    const shown = curves.filter((curve) => !state.hidden.has(`${id}/${curve.name}`));
    const chart = stacked ? stackedChart(shown) : lineChart(shown);
    chart.picture.setAttribute("aria-label", title);
    card.replaceChildren(element("figcaption", "", title), chart.picture, reading, names);
    follow(chart, shown, reading, t(unit));
  };
  for (const curve of curves.length > 1 || stacked ? curves : []) {
    const key = `${id}/${curve.name}`;
    const toggle = button(curve.name, () => {
      if (!state.hidden.delete(key)) state.hidden.add(key);
      toggle.setAttribute("aria-pressed", !state.hidden.has(key));
      draw();
    }, `name c${curve.color}${curve.dots ? " dots" : ""}`);
    toggle.setAttribute("aria-pressed", !state.hidden.has(key));
    names.append(toggle);
  }
  draw();
  return card;
}

function frame(x, y) {
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
  const scaleX = (value) => LEFT + ((value - x[0]) / (x[1] - x[0] || 1)) * PLOT_WIDTH;
  const scaleY = (value) => TOP + PLOT_HEIGHT - ((value - y[0]) / (y[1] - y[0] || 1)) * PLOT_HEIGHT;
  for (const value of ticks(...y, 4)) {
    const at = scaleY(value);
    picture.append(svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: at, y2: at }));
    picture.append(svg("text", { class: "tick", x: LEFT - 5, y: at + 3.5, "text-anchor": "end" }, short(value)));
  }
  for (const value of ticks(...x, 4)) {
    const at = scaleX(value), anchor = at > WIDTH - RIGHT - 12 ? "end" : at < LEFT + 8 ? "start" : "middle";
    picture.append(svg("text", { class: "tick", x: at, y: HEIGHT - 8, "text-anchor": anchor }, short(value)));
  }
  return { picture, scaleX, scaleY };
}

const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)},${y.toFixed(1)}`).join("");

function lineChart(curves) {
  const points = curves.map(pairs);
  const ends = curves.flatMap((curve) => [...(curve.low ?? []), ...(curve.high ?? [])]).filter((value) => value !== null);
  let y = shownRange([...points.map((curve) => curve.map((point) => point[1])), ...ends.map((value) => [value])]) ?? [0, 1];
  if (y[0] === y[1]) y = [y[0] - (Math.abs(y[0]) || 1) / 2, y[1] + (Math.abs(y[1]) || 1) / 2];
  const room = 0.06 * (y[1] - y[0]);
  y = [y[0] - room, y[1] + room];
  const chart = frame(xRange(points), y);
  const inside = (value) => Math.min(Math.max(value, y[0]), y[1]);
  const at = ([x, value]) => [chart.scaleX(x), chart.scaleY(inside(value))];
  curves.forEach((curve, k) => {
    const own = points[k];
    if (curve.low && !curve.dots) {
      const bounded = own.filter(([, , i]) => curve.low[i] !== null && curve.high[i] !== null);
      const upper = bounded.map(([x, , i]) => at([x, curve.high[i]]));
      const lower = bounded.map(([x, , i]) => at([x, curve.low[i]])).reverse();
      chart.picture.append(svg("path", { class: `band c${curve.color}`, d: `${path([...upper, ...lower])}Z` }));
    }
    const line = svg("path", { class: `line c${curve.color}${curve.dots ? " thin" : ""}`, d: path(own.map(at)) });
    chart.picture.append(line);
    for (const [x, value, i] of curve.dots || own.length === 1 ? own : []) {
      const [cx, cy] = at([x, value]);
      if (curve.low && curve.low[i] !== null) {
        const [y1, y2] = [chart.scaleY(inside(curve.low[i])), chart.scaleY(inside(curve.high[i]))];
        chart.picture.append(svg("line", { class: `bar c${curve.color}`, x1: cx, x2: cx, y1, y2 }));
      }
      chart.picture.append(svg("circle", { class: `dot c${curve.color}`, cx, cy, r: 2.6 }));
    }
    for (const [x, value] of own.filter(([, value]) => value < y[0] || value > y[1])) {
      const [left, top] = at([x, value]), down = value > y[1] ? 5 : -5;
      const d = `M${left},${top}l-3.5,${down}h7Z`;
      chart.picture.append(svg("path", { class: `spike c${curve.color}`, d }, svg("title", {}, number(value))));
    }
  });
  return chart;
}

function xRange(points) {
  const all = points.flat().map((point) => point[0]);
  if (!all.length) return [0, 1];
  const [low, high] = extent(all);
  return low === high ? [Math.min(0, low), high || 1] : [low, high];
}

// Shares that add up to 1, one above the other.
function stackedChart(curves) {
  const x = curves[0]?.x ?? [];
  const kept = x.map((_, i) => i).filter((i) => curves.some((curve) => curve.y[i] !== null));
  const chart = frame(xRange([kept.map((i) => [x[i], 0])]), [0, 1]);
  let below = kept.map(() => 0);
  for (const curve of curves) {
    const above = kept.map((i, k) => Math.min(1, below[k] + (curve.y[i] ?? 0)));
    const upper = kept.map((i, k) => [chart.scaleX(x[i]), chart.scaleY(above[k])]);
    const lower = kept.map((i, k) => [chart.scaleX(x[i]), chart.scaleY(below[k])]).reverse();
    if (kept.length) chart.picture.append(svg("path", { class: `area c${curve.color}`, d: `${path([...upper, ...lower])}Z` }));
    below = above;
  }
  return chart;
}

// Shows the numbers at the point next to the pointer, or a finger, and a line through it.
function follow(chart, curves, reading, unit) {
  const all = curves.map(pairs);
  const places = [...new Set(all.flat().map((point) => point[0]))].sort((a, b) => a - b);
  reading.textContent = "";
  if (!places.length) return;
  const line = svg("line", { class: "pointer", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  chart.picture.append(line);
  chart.picture.addEventListener("pointermove", (event) => {
    const box = chart.picture.getBoundingClientRect();
    const wanted = ((event.clientX - box.left) / box.width) * WIDTH;
    const distance = (place) => Math.abs(chart.scaleX(place) - wanted);
    const x = places.reduce((best, place) => (distance(place) < distance(best) ? place : best));
    for (const end of ["x1", "x2"]) line.setAttribute(end, chart.scaleX(x));
    line.setAttribute("visibility", "visible");
    const numbers = curves.map((curve, i) => [curve, all[i].find((point) => point[0] === x)]).filter(([, point]) => point);
    reading.replaceChildren(`${number(x)} ${unit}`, ...numbers.map(([curve, [, value, i]]) => {
      const band = curve.low && curve.low[i] !== null ? ` [${number(curve.low[i])}, ${number(curve.high[i])}]` : "";
      return element("span", `c${curve.color}`, `${curves.length > 1 ? `${curve.name} ` : ""}${number(value)}${band}`);
    }));
  });
  chart.picture.addEventListener("pointerleave", () => {
    line.setAttribute("visibility", "hidden");
    reading.textContent = "";
  });
}
