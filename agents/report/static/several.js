// Several runs: the table of the seeds of each folder, the comparison of the first folder with each other one, and the
// keys in which configurations differ. The curves of groups are in curves.js.

// What the intervals of a table are over, and what they cannot say; as agents.evaluation.resampling.caution.
function caution(seeds, prompts, coverage) {
  const said = t(seeds > 1 ? "over_both" : "over_prompts", { seeds, prompts });
  return note(coverage ? `${said} ${t("few_seeds", { seeds, coverage })}` : said);
}

function seedTable({ name, table: own }) {
  const made = element("div", "", element("h2", "", t("seeds_of", { name })));
  if (!own) {
    made.append(note(t("no_scores")));
    return made;
  }
  const columns = ["before", "after", "difference", "iqm_before", "iqm_after"];
  made.append(table(
    [t("figure"), ...columns.map((key) => t(key))],
    own.figures.map((row) => [row.figure, ...columns.map((key) => estimate(row[key], key === "difference"))])));
  made.append(table(
    [t("figure"), ...own.names.map((seed) => t("seed", { name: seed })), t("between"), t("within")],
    own.figures.map((row) => [row.figure, ...row.seeds.map((one) => estimate(one)), number(row.between), number(row.within)])));
  made.append(caution(own.names.length, own.n_prompts, own.coverage));
  return made;
}

function comparedTable(one) {
  if (!one) return note(t("no_scores"));
  const [a, b] = one.names;
  const rows = one.figures.map((row) => [row.figure, estimate(row.a), estimate(row.b), estimate(row.difference, true),
    estimate(row.probability), { a, b }[row.higher] ?? t("not_shown")]);
  return element("div", "", element("h2", "", t("compared", { a, b })),
    table([t("figure"), a, b, t("difference"), `P(${a} > ${b})`, t("higher")], rows),
    caution(one.n_seeds, one.n_prompts, one.coverage));
}

function several() {
  if (!hasGroups()) return "";
  const made = section("several", t("several"));
  const differences = data.differences.length
    ? table([t("key"), ...data.groups.map((group) => group.name)], data.differences) : note(t("no_differences"));
  made.append(...data.comparisons.map(comparedTable), ...data.tables.map(seedTable),
    element("h2", "", t("differences")), differences);
  return made;
}
