// The table of answers, which the server filters and sends fifty at a time.

import { byId, call, element, promptOf, trimmed, words } from "./page.js";

const filters = byId("filters");
let start = 0;

function query(more) {
  return new URLSearchParams({ ...Object.fromEntries(new FormData(filters)), ...more }).toString();
}

// The mark that an answer puts before each completion: its score, a tick or its rank.
function marks({ kind, value, completions }) {
  if (kind === "score") return value.map(String);
  if (kind === "compare") return completions.map((_, index) => (index === value ? "✓" : "·"));
  if (kind === "rank") return completions.map((_, index) => `#${value.indexOf(index) + 1}`);
  return completions.map(() => "·");
}

function row(answer) {
  const made = element("tr");
  const said = element("td", "said");
  const shown = marks(answer);
  const order = answer.kind === "rank" ? answer.value : answer.completions.map((_, index) => index);
  for (const index of order) {
    const line = element("div");
    line.append(element("span", "mark", shown[index]), element("span", "text", trimmed(answer.completions[index])));
    said.append(line);
  }
  if (typeof answer.value === "string") said.append(element("div", "quiet", words[answer.value]));
  const time = new Date(answer.time * 1000).toLocaleString(document.documentElement.lang);
  const seconds = answer.seconds === null ? "" : `${answer.seconds.toFixed(1)} s`;
  made.append(element("td", "about nowrap", time), element("td", "about", answer.rater), element("td", "about nowrap", words[answer.kind]));
  const prompt = element("td", "text");
  prompt.append(...promptOf(answer));
  made.append(prompt, said, element("td", "number", seconds));
  return made;
}

function sum({ agreement, self_agreement }) {
  const between = Object.entries(agreement).map(
    ([kind, { alpha, units, raters }]) =>
      `${words[kind]} ${alpha === null ? "–" : alpha.toFixed(2)} (n = ${units}, ${words.rater}: ${raters})`,
  );
  const own = Object.entries(self_agreement).map(([rater, { alike, items }]) => `${rater} ${alike.toFixed(2)} (n = ${items})`);
  return [
    between.length ? `${words.agreement}: ${between.join(", ")}` : "",
    own.length ? `${words.self_agreement}: ${own.join(", ")}` : "",
  ].filter(Boolean).join(" · ");
}

async function load(from) {
  const asked = query({ start: from });
  try {
    const page = await call(`/api/history?${asked}`);
    if (asked !== query({ start: from })) return; // the filters changed while the request was under way
    start = from + page.rows.length;
    if (from === 0) byId("rows").replaceChildren();
    byId("rows").append(...page.rows.map(row));
    byId("more").hidden = start >= page.n;
    byId("status").textContent = page.n ? `${start} / ${page.n}` : words.no_answers;
    byId("agreement").textContent = sum(page);
    const raters = filters.elements.rater;
    const known = [...raters.options].map((option) => option.value);
    for (const name of page.raters.filter((name) => !known.includes(name))) raters.append(new Option(name, name));
  } catch (error) {
    byId("status").textContent = error.message;
  }
  for (const link of document.querySelectorAll("[data-form]")) link.href = `/export?${query({ form: link.dataset.form })}`;
}

filters.addEventListener("input", () => load(0));
filters.addEventListener("submit", (event) => event.preventDefault());
byId("more").addEventListener("click", () => load(start));
load(0);
