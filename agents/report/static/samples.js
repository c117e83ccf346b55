// The samples over time: the same prompts at every table, side by side, with what changed marked.

const MOST_PAIRS = 4e6;  // pairs of words that are compared: of longer texts only the ends are

// A text in pieces that are compared: words with the space before them, and single characters of Chinese or Japanese.
const piecesOf = (text) => text.match(/\s*[\u3040-\u30ff\u3400-\u9fff]|\s*[^\s\u3040-\u30ff\u3400-\u9fff]+|\s+/g) ?? [];

// For each piece of `after`, whether it is in no longest common subsequence with `before`.
function changedPieces(before, after) {
  let start = 0, end = 0;
  while (start < Math.min(before.length, after.length) && before[start] === after[start]) start += 1;
  while (end < Math.min(before.length, after.length) - start && before.at(-1 - end) === after.at(-1 - end)) end += 1;
  const a = before.slice(start, before.length - end), b = after.slice(start, after.length - end);
  const changed = after.map((_, i) => i >= start && i < after.length - end);
  if (a.length * b.length > MOST_PAIRS) return changed;
  // lengths[i][j]: the longest common subsequence of a from i and b from j.
  const lengths = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i -= 1) {
    for (let j = b.length - 1; j >= 0; j -= 1) {
      lengths[i][j] = a[i] === b[j] ? lengths[i + 1][j + 1] + 1 : Math.max(lengths[i + 1][j], lengths[i][j + 1]);
    }
  }
  for (let i = 0, j = 0; i < a.length && j < b.length;) {
    if (a[i] === b[j]) {
      changed[start + j] = false;
      i += 1;
      j += 1;
    } else if (lengths[i + 1][j] >= lengths[i][j + 1]) i += 1;
    else j += 1;
  }
  return changed;
}

// A text whose pieces that another text lacks are marked.
function compared(text, before) {
  const made = element("p", "text");
  const pieces = piecesOf(text);
  const changed = before === null ? pieces.map(() => false) : changedPieces(piecesOf(before), pieces);
  for (let i = 0; i < pieces.length;) {
    let end = i;
    while (end < pieces.length && changed[end] === changed[i]) end += 1;
    const part = visible(pieces.slice(i, end).join(""));
    made.append(changed[i] ? element("mark", "", part) : part);
    i = end;
  }
  return made;
}

function samples() {
  const made = section("samples", t("samples"));
  const { prompts, tables, n_tables: nTables, n_prompts: nPrompts } = data.runs[state.run].samples;
  if (!tables.length) {
    made.append(note(t("no_samples")));
    return made;
  }
  const strips = element("div");
  const draw = () => strips.replaceChildren(...prompts.map((prompt, i) => {
    const chosen = state.samples === "all" ? tables : [...new Set([tables[0], tables.at(-1)])];
    let before = null;
    const cells = chosen.filter((one) => one.cells[i]).map((one) => {
      const cell = one.cells[i];
      const head = element("div", "quiet", `${number(one.tokens)} ${t("tokens")} · `,
        element("b", "", number(cell.reward)), ` · ${t(`end_${cell.end}`)}`);
      const text = compared(cell.text, state.unmarked ? null : before);
      before = cell.text;
      return element("div", "sample", head, text);
    });
    return element("article", "card", element("p", "text prompt", visible(prompt)), element("div", "strip", ...cells));
  }));
  const mark = element("input");
  mark.type = "checkbox";
  mark.checked = !state.unmarked;
  mark.addEventListener("change", () => {
    state.unmarked = !mark.checked;
    draw();
  });
  const choices = [["ends", t("first_last")], ["all", t("all_tables")]];
  const choose = menu(t("show"), choices, state.samples ?? "ends", (value) => {
    state.samples = value;
    draw();
  });
  made.append(note(t("samples_note")), element("div", "choices", choose, element("label", "choice", mark, t("mark"))));
  if (tables.length < nTables) made.append(note(t("tables_note", { shown: tables.length, all: nTables })));
  if (prompts.length < nPrompts) made.append(note(t("prompts_note", { shown: prompts.length, all: nPrompts })));
  draw();
  made.append(strips);
  return made;
}
