// The page: its head, its sections in order, and the choices of language, theme and run.

function applyTheme() {
  if (state.theme) document.documentElement.dataset.theme = state.theme;
  else delete document.documentElement.dataset.theme;
}

function isDark() {
  return state.theme ? state.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function head() {
  const languages = Object.keys(data.words).filter((code) => code !== state.language);
  const names = { en: "English", zh: "中文" };
  const theme = isDark() ? "light" : "dark";
  const made = [
    element("strong", "", "textenv"),
    element("span", "who", data.title),
    element("span", "space"),
    ...languages.map((code) => {
      const toggle = button(names[code], () => choose("language", code), "link language");
      toggle.lang = code;
      return toggle;
    }),
    button(t(theme), () => choose("theme", theme), "link theme"),
  ];
  document.getElementById("header").replaceChildren(...made);
}

function choose(name, value) {
  state[name] = value;
  kept.set(name, value);
  drawAll();
}

function happened() {
  const made = section("happened", t("happened"));
  const run = data.runs[state.run];
  if (data.runs.length > 1) {
    const names = data.runs.map((one, i) => [i, one.name]);
    made.append(element("div", "choices", menu(t("run"), names, state.run, (value) => {
      state.run = Number(value);
      drawAll();
    })));
  }
  made.append(element("div", "card", ...run.summary[state.language].map((line) => element("p", "", line))));
  if (run.changes.length) {
    const rows = run.changes.map((row) => [row.figure, estimate(row.before), estimate(row.after), estimate(row.difference, true)]);
    made.append(table([t("figure"), t("before"), t("after"), t("difference")], rows), note(t("interval_note")));
  }
  return made;
}

// What the doctor found in the run, most likely first.
function findings() {
  const found = data.runs[state.run].findings ?? [];
  if (!found.length) return "";
  return section("findings", t("findings"), ...found.map((one) => element("article", "card",
    element("p", "", element("b", "", one.cause)), element("p", "", one.evidence), element("p", "", one.cure))));
}

// A page of a run that goes on loads itself again, unless the visitor is busy with it.
function follows() {
  if (!data.live) return;
  const says = element("p", "card live", t("live", { seconds: data.live }), " ");
  const next = () => setTimeout(() => location.reload(), 1000 * data.live);
  let timer = next();
  const toggle = button(t("pause"), () => {
    clearTimeout(timer);
    timer = timer === null ? next() : null;
    toggle.textContent = t(timer === null ? "resume" : "pause");
  });
  says.append(toggle);
  document.getElementById("main").before(says);
}

function settings() {
  const made = section("settings", t("settings"));
  const rows = Object.entries(data.runs[state.run].config).map(([key, value]) => [key, value]);
  const search = element("input");
  search.type = "search";
  search.placeholder = t("search");
  const list = element("div");
  const draw = () => list.replaceChildren(table([], rows.filter((row) => row.join(" ").includes(search.value)), "plain"));
  search.addEventListener("input", draw);
  draw();
  made.append(element("details", "", element("summary", "", t("all_keys", { n: rows.length })), search, list));
  return rows.length ? made : "";
}

function drawAll() {
  document.documentElement.lang = state.language === "zh" ? "zh-Hans" : "en";
  applyTheme();
  head();
  const made = data.kind === "episode" ? [tokens()]
    : [happened(), findings(), several(), curves(), samples(), tokens(), credit(), settings()];
  made.push(note(t("made", { time: data.made, version: data.version })));
  document.getElementById("main").replaceChildren(...made.filter(Boolean));
}

drawAll();
follows();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", head);
