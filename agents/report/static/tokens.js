// The token view: episodes as coloured text, with the numbers and the likeliest alternatives of the token under the
// pointer, or of the one that has the focus.

// What colours a token: the name of its numbers, and the value that has no colour; without one, colours go from the
// lowest number to the highest.
const COLOURS = [["reward", 0], ["penalty", 0], ["return"], ["value"], ["advantage", 0], ["kl", 0], ["entropy"], ["ratio", 1],
  ["clipped", 0], ["support"], ["log_prob"]];

const isKnown = (value) => value !== null && value !== undefined;

// The range of a number in an episode: credit is a matter of one text, and a bad text would leave no colour to a good one.
function rangeOf(episode, name, middle) {
  const values = episode[name].filter(isKnown).map(Number);
  const [low, high] = values.length ? extent(values) : [0, 0];
  if (middle === undefined) return { low, high };
  const reach = Math.max(Math.abs(low - middle), Math.abs(high - middle));
  return { low: middle - reach, high: middle + reach, middle };
}

// Colours an element by a number: above the middle in one colour, below it in another, the stronger the farther.
function tint(made, value, range) {
  if (!isKnown(value)) return;
  const { low, high, middle = low } = range;
  const far = (Number(value) - middle) / (high - middle || 1);
  made.classList.add(far < 0 ? "below" : "above");
  made.style.setProperty("--share", `${Math.round(72 * Math.min(1, Math.abs(far)))}%`);
}

// The text of a token: what cannot be seen has a sign, and a line break is kept after its own.
function pieceText(piece) {
  const shown = visible(piece).replace(/\n/g, "⏎\n");
  return shown === "" ? "∅" : shown;
}

function details(episode, i) {
  const made = element("div", "details");
  made.append(element("p", "text", element("b", "", pieceText(episode.pieces[i])),
    element("span", "quiet", ` ${t("token_number")} ${i + 1} / ${episode.pieces.length}`)));
  const numbers = COLOURS.map(([name]) => name).filter((name) => isKnown(episode[name]?.[i]));
  if (!numbers.length) {
    made.append(note(t("not_trained")));
    return made;
  }
  const value = (name) => (typeof episode[name][i] === "boolean" ? t(episode[name][i] ? "yes" : "no") : number(episode[name][i]));
  made.append(element("dl", "", ...numbers.flatMap((name) => [element("dt", "", t(`of_${name}`)), element("dd", "", value(name))])));
  const list = element("ol", "alternatives");
  for (const [text, chance] of episode.alternatives[i] ?? []) {
    const bar = element("span", "chance");
    bar.style.width = `${(100 * chance).toFixed(1)}%`;
    const isTaken = text === episode.pieces[i];
    list.append(element("li", isTaken ? "taken" : "", bar, element("span", "text", pieceText(text)),
      element("span", "quiet", `${(100 * chance).toPrecision(3)} %`)));
  }
  made.append(element("h2", "", t("alternatives")), list);
  return made;
}

// The tokens of an episode, each a button in its colour.
function tokenText(episode, name, range, show) {
  const made = element("p", "text tokens");
  made.append(element("span", "quiet", visible(episode.prompt)));
  episode.pieces.forEach((piece, i) => {
    const token = element("span", "token", pieceText(piece));
    token.tabIndex = 0;
    if (!isKnown(episode.value?.[i]) && !isKnown(episode.log_prob?.[i])) token.classList.add("other");
    tint(token, episode[name]?.[i], range);
    for (const event of ["pointerenter", "focus", "click"]) token.addEventListener(event, () => show(i, token));
    token.addEventListener("keydown", (event) => {
      const next = { ArrowRight: token.nextElementSibling, ArrowLeft: token.previousElementSibling }[event.key];
      if (next?.classList.contains("token")) next.focus();
    });
    made.append(token);
  });
  return made;
}

function legend(name, range) {
  const bar = element("span", `scale${range.middle === undefined ? " one" : ""}`);
  const ends = name === "clipped" ? [t("no"), t("yes")] : [number(range.low), number(range.high)];
  if (name === "clipped") bar.classList.add("one");
  return element("div", "legend quiet", ends[0], bar, ends[1]);
}

const total = (values) => (values ?? []).reduce((sum, value) => sum + (value ?? 0), 0);

function tokens() {
  const { tables, n_tables: nTables } = data.runs[state.run].episodes ?? { tables: [] };
  if (!tables.length) return "";
  const made = section("tokens", t("tokens_view"));
  const view = element("div");
  const draw = () => {
    const at = Math.min(state.table ?? tables.length - 1, tables.length - 1);
    const { episodes } = tables[at];
    const chosen = Math.min(state.episode ?? episodes.length - 1, episodes.length - 1);
    const episode = episodes[chosen];
    const known = COLOURS.filter(([key]) => episode[key]);
    const [name, middle] = known.find(([key]) => key === state.colour) ?? known.find(([key]) => key === "advantage") ?? known[0];
    const range = rangeOf(episode, name, middle);
    const set = (key) => (value) => {
      state[key] = key === "colour" ? value : Number(value);
      draw();
      view.querySelector(`[data-key="${key}"] select`).focus();
    };
    const choice = (key, label, pairsOf, value) => {
      const one = menu(label, pairsOf, value, set(key));
      one.dataset.key = key;
      return one;
    };
    const choices = element("div", "choices", choice("colour", t("colour_by"), known.map(([key]) => [key, t(`of_${key}`)]), name));
    if (data.kind !== "episode") {
      const score = (one) => `${t("of_reward")} ${number(total(one.reward))}`;
      choices.append(choice("table", t("after_tokens"), tables.map((one, i) => [i, number(one.tokens)]), at),
        choice("episode", t("episode"), episodes.map((one, i) => [i, score(one)]), chosen));
    }
    const panelOf = element("div", "side");
    let marked = null;
    const show = (i, token) => {
      marked?.classList.remove("marked");
      token.classList.add("marked");
      marked = token;
      panelOf.replaceChildren(details(episode, i));
    };
    const text = tokenText(episode, name, range, show);
    const explained = t(`about_${name}`);
    view.replaceChildren(choices, element("div", "card both", element("div", "", text, legend(name, range),
      explained.startsWith("about_") ? "" : note(explained), lines(episode)), panelOf));
    const first = text.querySelector(".token:not(.other)") ?? text.querySelector(".token");
    if (first) show([...text.querySelectorAll(".token")].indexOf(first), first);
  };
  made.append(note(data.kind === "episode" ? t("episode_note") : t("tokens_note")));
  if (nTables > tables.length) made.append(note(t("tables_note", { shown: tables.length, all: nTables })));
  draw();
  made.append(view);
  return made;
}

// Value, return and advantage along the text.
function lines(episode) {
  const names = ["value", "return", "advantage"].filter((name) => episode[name]);
  const x = episode.pieces.map((_, i) => i + 1);
  const curvesOfText = names.map((name, color) => ({ name: t(`of_${name}`), color, x, y: episode[name] }));
  return panel("along", t("along"), curvesOfText, false, "token_number");
}

// The values of prefixes by Monte Carlo beside the critic's, where somebody has measured them.
function credit() {
  const { credit: measured } = data.runs[state.run];
  if (!measured?.length) return "";
  const made = section("credit", t("credit"), note(t("credit_note")));
  measured.forEach((one, i) => {
    const x = one.critic.map((_, k) => k);
    const shown = [{ name: t("monte_carlo"), color: 1, x, y: one.monte_carlo, low: one.low, high: one.high },
      { name: t("critic"), color: 0, x, y: one.critic }];
    const text = element("p", "text", element("span", "quiet", visible(one.prompt)), ...one.tokens.map(pieceText));
    made.append(element("article", "card", text, panel(`credit${i}`, "", shown, false, "tokens_before")));
  });
  return made;
}
