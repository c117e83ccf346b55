// The three kinds of question. Each draws the completions of an item into the element `container` and returns
//   keys: the descriptions of its keys, shown below the item;
//   key(event): handles a key and returns whether it was one of its own;
//   value(): the answer as the server expects it, or null while it is incomplete.
// `draft` is the unfinished answer, which survives a reload; `changed` is called when it changes; `send(value)` sends an
// answer.

import { draggable } from "./order.js";
import { element, trimmed, words } from "./page.js";

function card(label, text) {
  const made = element("article", "card completion");
  made.append(element("span", "label", label), element("p", "text", trimmed(text)));
  return made;
}

// The description of the number keys in use, such as "1–4 next best"; empty if there are none.
function numbered(name, digits) {
  if (!digits.length) return [];
  const [first, last] = [digits[0], digits.at(-1)];
  return [words[name].replace("{digits}", first === last ? first : `${first}–${last}`)];
}

function score(item, container, draft, changed) {
  const [low, high] = item.scale;
  let current = 0;
  const rows = item.completions.map((text, number) => {
    const row = card(String(number + 1), text);
    const slider = element("input");
    const shown = element("output", "score", "–");
    Object.assign(slider, { type: "range", min: low, max: high, step: 1, value: (low + high) / 2 });
    slider.setAttribute("aria-label", `${words.score} ${number + 1}`);
    slider.addEventListener("input", () => set(number, Number(slider.value)));
    slider.addEventListener("pointerup", () => set(number, Number(slider.value))); // a click on the middle, where the knob is, sends no "input"
    row.addEventListener("pointerdown", () => focus(number));
    const line = element("div", "slider");
    line.append(element("span", "quiet", String(low)), slider, element("span", "quiet", String(high)), shown);
    row.append(line);
    return { row, slider, shown };
  });
  container.append(...rows.map(({ row }) => row));

  function show() {
    rows.forEach(({ row, slider, shown }, number) => {
      const known = draft[number] !== undefined && draft[number] !== null;
      if (known) slider.value = draft[number];
      shown.textContent = known ? draft[number] : "–";
      row.classList.toggle("unset", !known);
      row.classList.toggle("current", number === current && rows.length > 1);
    });
    changed();
  }
  function set(number, value) {
    draft[number] = Math.min(high, Math.max(low, value));
    show();
  }
  function focus(number) {
    current = Math.min(rows.length - 1, Math.max(0, number));
    show();
  }
  function key(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const walk = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (walk) focus(current + walk);
    else if (step) set(current, Number(draft[current] ?? rows[current].slider.value) + step);
    else if (/^[0-9]$/.test(event.key)) {
      const value = Number(event.key);
      if (value < low || value > high) return false;
      set(current, value);
      focus(current + 1);
    } else return false;
    return true;
  }
  show();
  const complete = () => rows.every((_, number) => Number.isFinite(draft[number]));
  const digits = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9].filter((digit) => digit >= low && digit <= high);
  const walks = rows.length > 1 ? [words.keys_text] : [];
  const keys = [...numbered("keys_score", digits), ...walks, words.keys_change, words.keys_send];
  return { keys, key, value: () => (complete() ? rows.map((_, number) => draft[number]) : null) };
}

function compare(item, container, draft, changed, send) {
  const pair = element("div", "pair");
  const choices = element("div", "choices");
  ["a", "b"].forEach((choice, number) => {
    const row = card(choice.toUpperCase(), item.completions[number]);
    pair.append(row);
  });
  for (const [choice, name, hint] of [
    ["a", "better_a", "A"],
    ["tie", "tie", "T"],
    ["both_bad", "both_bad", "X"],
    ["b", "better_b", "B"],
  ]) {
    const button = element("button", choice.length === 1 ? "primary" : "", words[name] + " ");
    button.dataset.choice = choice;
    button.append(element("kbd", "", hint));
    button.addEventListener("click", () => send(choice));
    choices.append(button);
  }
  container.append(pair, choices);
  const keys = { a: "a", ArrowLeft: "a", 1: "a", b: "b", ArrowRight: "b", 2: "b", t: "tie", x: "both_bad" };
  function key(event) {
    const choice = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (choice) send(choice);
    return Boolean(choice);
  }
  return { keys: [words.keys_compare], key, value: () => null };
}

function rank(item, container, draft, changed) {
  const count = item.completions.length;
  const cards = item.completions.map((text, number) => {
    const row = card(String(number + 1), text);
    row.append(element("span", "badge"));
    row.addEventListener("click", () => toggle(number));
    return row;
  });
  const side = element("aside", "order card");
  const list = element("ol", "");
  side.append(element("h2", "", words.your_order), list, element("p", "quiet", words.drag));
  const texts = element("div", "texts");
  texts.append(...cards);
  const columns = element("div", "columns");
  columns.append(texts, side);
  container.append(columns);

  const rest = () => item.completions.map((_, number) => number).filter((number) => !draft.includes(number));
  function show() {
    if (draft.length === count - 1) draft.push(...rest()); // only one position is left for the last
    cards.forEach((row, number) => {
      const at = draft.indexOf(number);
      row.querySelector(".badge").textContent = at < 0 ? "" : `#${at + 1}`;
      row.classList.toggle("unset", at < 0);
    });
    list.replaceChildren(
      ...[...draft, ...rest()].map((number, at) => {
        const row = element("li", at < draft.length ? "" : "unset");
        row.dataset.number = number;
        row.append(element("span", "at", at < draft.length ? `${at + 1}.` : "–"), element("span", "label", String(number + 1)));
        row.append(element("span", "short", at < draft.length ? trimmed(item.completions[number]) : words.not_ranked));
        return row;
      }),
    );
    changed();
  }
  function toggle(number) {
    const at = draft.indexOf(number);
    if (at < 0) draft.push(number);
    else draft.splice(at, draft.length === count && at === count - 2 ? 2 : 1); // with the last one, which would be added again at once
    show();
  }
  function back() {
    draft.splice(draft.length === count ? count - 2 : draft.length - 1);
    show();
  }
  draggable(list, (from, to) => {
    const number = [...draft, ...rest()][from];
    if (from < draft.length) draft.splice(from, 1);
    draft.splice(Math.min(to, draft.length), 0, number);
    show();
  });
  function key(event) {
    const number = Number(event.key) - 1;
    if (event.key === "Backspace") back();
    else if (/^[1-9]$/.test(event.key) && number < count) {
      if (!draft.includes(number)) toggle(number);
    } else return false;
    return true;
  }
  show();
  const digits = item.completions.map((_, number) => number + 1);
  const keys = [...numbered("keys_rank", digits), words.keys_back, words.keys_send];
  return { keys, key, value: () => (draft.length === count ? [...draft] : null) };
}

export const kinds = { score, compare, rank };
