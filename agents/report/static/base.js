// Functions that all parts of the page share. Texts of models are only ever inserted as text nodes, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";

// What a visitor chose, kept for the next visit where the browser allows it.
const kept = {
  get(name, otherwise) {
    try { return localStorage.getItem(`textenv-report-${name}`) ?? otherwise; } catch { return otherwise; }
  },
  set(name, value) {
    try { localStorage.setItem(`textenv-report-${name}`, value); } catch { /* private mode: the choice holds until the page is left */ }
  },
};
const state = {
  language: kept.get("language", navigator.language.startsWith("zh") ? "zh" : "en"),
  theme: kept.get("theme", ""),
  run: 0,
  hidden: new Set(),  // curves that are switched off, by "panel/curve"
  other: "",
};
if (!(state.language in data.words)) state.language = "en";

const t = (name, values = {}) =>
  (data.words[state.language][name] ?? name).replace(/\{(\w+)\}/g, (whole, key) => values[key] ?? whole);

function element(tag, className = "", ...content) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...content.map((one) => (typeof one === "number" ? String(one) : one)));
  return made;
}

function svg(tag, attributes = {}, ...content) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...content);
  return made;
}

function section(id, title, ...content) {
  const made = element("section", "", element("h1", "", title), ...content);
  made.id = id;
  return made;
}

const note = (text) => element("p", "quiet", text);

// A text of a model or a prompt: control characters are shown by their code, as Python writes them, since some of
// them turn the direction of what stands around them.
const CONTROL = /[\u0000-\u0009\u000b-\u001f\u007f-\u009f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;
const visible = (text) => text.replace(CONTROL, (char) => `\\u${char.charCodeAt(0).toString(16).padStart(4, "0")}`);

function button(label, action, className = "") {
  const made = element("button", className, label);
  made.type = "button";
  made.addEventListener("click", action);
  return made;
}

// A menu of [value, label] pairs.
function menu(label, pairs, chosen, change) {
  const select = element("select");
  for (const [value, text] of pairs) {
    const option = element("option", "", text);
    option.value = value;
    option.selected = String(value) === String(chosen);
    select.append(option);
  }
  select.addEventListener("change", () => change(select.value));
  return element("label", "choice", label, select);
}

// A number with three significant digits; whole ones in full.
function number(value) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-4) return value.toExponential(2);
  return size >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(3)));
}

const short = (value) =>
  Math.abs(value) >= 1e6 ? `${Number((value / 1e6).toPrecision(3))}M`
    : Math.abs(value) >= 1e3 ? `${Number((value / 1e3).toPrecision(3))}k` : number(value);

// An estimate [value, low, high] as text.
function estimate(one, sign = false) {
  if (!one) return "–";
  const [value, low, high] = one.map((n) => (sign && n > 0 ? `+${number(n)}` : number(n)));
  return one[1] === null ? value : `${value} [${low}, ${high}]`;
}

// A table with a head; cells are strings or elements.
function table(head, rows, className = "") {
  const made = element("table", className);
  made.append(element("thead", "", element("tr", "", ...head.map((cell) => element("th", "", cell)))));
  made.append(element("tbody", "", ...rows.map((row) => element("tr", "", ...row.map((cell) => element("td", "", cell))))));
  return element("div", "scroll", made);
}
