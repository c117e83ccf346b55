// The panels of a run's curves, or of groups of runs: which figures stand in which panel.

const THIRDS = ["first", "middle", "last"];
const COLORS = 6;  // in report.css

// Whether the curves are those of groups, each the mean of its runs with a band; otherwise those of the chosen run.
const hasGroups = () => (data.groups ?? []).length > 0;

// The curves of one figure: one for each group, or that of the run.
function curvesOf(key, name = "", sign = 1) {
  const turned = (values) => values?.map((value) => (value === null ? null : sign * value));
  const run = data.runs[state.run];
  const found = hasGroups() ? data.groups.map((group) => group.figures[key])
    : [run.figures[key] && { x: run.x, y: run.figures[key] }];
  return found.flatMap((curve, i) => {
    if (!curve) return [];
    const [low, high] = sign < 0 ? [curve.high, curve.low] : [curve.low, curve.high];
    return [{ name: groupName(i, name), color: i % COLORS, x: curve.x, y: turned(curve.y), low: turned(low), high: turned(high) }];
  });
}

function groupName(i, name) {
  return (data.groups ?? []).length > 1 ? [data.groups[i].name, name].filter(Boolean).join(" · ") : name;
}

// The evaluations of a figure, as dots: of each group, or of the run.
function evaluated(figure, name, color) {
  const found = hasGroups() ? data.groups : [data.runs[state.run]];
  return found.flatMap(({ evaluations }, i) => {
    if (!evaluations[figure]) return [];
    const own = found.length > 1 ? i % COLORS : color;
    return [{ name: groupName(i, name), color: own, dots: true, ...evaluations[figure] }];
  });
}

// Several figures of the chosen run in one panel.
function ofRun(pairsOfKeys) {
  const run = data.runs[state.run];
  return pairsOfKeys
    .filter(([key]) => run.figures[key])
    .map(([key, name], i) => ({ name, color: i % COLORS, x: run.x, y: run.figures[key] }));
}

function panels() {
  const run = data.runs[state.run];
  const parts = Object.keys(run.figures).filter((key) => key.startsWith("reward/") && key !== "reward/task");
  const ends = ["eos", "stop", "length", "env"].map((end) => `episode/end_${end}`)
    .filter((key) => run.figures[key]?.some((value) => value > 0));
  const made = [
    ["reward", t("reward"), [...curvesOf("reward/task", t("training")), ...evaluated("reward", t("evaluation"), 1),
      ...evaluated("judge", t("judge"), 2)]],
    ["parts", t("parts"), parts.length > 1 ? ofRun(parts.map((key) => [key, key.slice("reward/".length)])) : []],
    ["kl", t("kl"), curvesOf("kl/sequence")],
    ["entropy", t("entropy"), curvesOf("train/entropy_loss", "", -1)],
    ["length", t("length"), curvesOf("episode/length")],
    ["ends", t("ends"), ofRun(ends.map((key) => [key, t(key.slice("episode/".length))])), true],
    ["value_loss", t("value_loss"), curvesOf("train/value_loss")],
    ["explained", t("explained"), ofRun([["train/explained_variance", t("all_tokens")],
      ...THIRDS.map((third) => [`value/explained_variance_${third}`, t(`third_${third}`)])])],
    ["clipping", t("clipping"), ofRun([["train/surrogate_clip_fraction", t("clip_fraction")],
      ["train/clip_fraction", t("clip_fraction")], ["train/approx_kl", t("approx_kl")]]
      .filter(([key]) => key !== "train/clip_fraction" || !run.figures["train/surrogate_clip_fraction"]))],
    ["time", t("time"), ofRun(["update", "reward", "evaluation", "rest"].map((key) => [`share/${key}`, t(`time_${key}`)])), true],
  ];
  return made.filter(([, , curves]) => curves.length).map((panelOf) => panel(...panelOf));
}

function curves() {
  const made = section("curves", t("curves"));
  const run = data.runs[state.run];
  const keys = Object.keys(run.figures).sort();
  if (!keys.length) {
    made.append(note(t("no_curves")));
    return made;
  }
  made.append(note(t("curves_note")));
  if (hasGroups()) made.append(note(t("bands_note", { name: run.name })));
  if (run.rows_per_point > 1) made.append(note(t("points_note", { n: run.rows_per_point })));
  const grid = element("div", "panels", ...panels());
  if (!keys.includes(state.other)) state.other = keys.includes("train/loss") ? "train/loss" : keys[0];
  const other = element("div", "other");
  const choose = (key) => {
    state.other = key;
    other.replaceChildren(menu(t("other"), keys.map((name) => [name, name]), key, choose), panel("other", key, curvesOf(key)));
  };
  choose(state.other);
  grid.append(other);
  made.append(grid);
  return made;
}
