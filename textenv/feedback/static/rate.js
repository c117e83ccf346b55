// The rating page: one item at a time. An answer stays on the screen until the server says that it is on the disk.

import { kinds } from "./kinds.js";
import { byId, call, promptOf, words } from "./page.js";

const POLL = 3000; // ms between requests for new items when there are none
let item = null;
let last = null; // the number of the answer that undo takes back, so that a repeated request takes back only one
let asked = null; // the question on the screen, as kinds.js returns it
let draft = [];
let busy = false;
let seconds = 0; // for which the item was in view before `since`
let since = null; // when it last came into view; null while the page is hidden

const looked = () => seconds + (since === null ? 0 : (performance.now() - since) / 1000);
const say = (text, wrong = false) => {
  byId("status").textContent = text;
  byId("status").classList.toggle("wrong", wrong);
};

function show(state) {
  const fresh = state.item && (!item || item.showing !== state.item.showing || !asked);
  item = state.item;
  const { done, skipped, left } = state.progress;
  byId("bar").max = Math.max(1, done + skipped + left);
  byId("bar").value = done + skipped;
  const count = words.progress.replace("{done}", done + skipped).replace("{all}", done + skipped + left);
  byId("count").textContent = count + (skipped ? ` · ${words.progress_skipped.replace("{skipped}", skipped)}` : "");
  byId("item").hidden = byId("skip").hidden = !item;
  byId("nothing").hidden = Boolean(item);
  document.querySelector(".keys").hidden = !item;
  last = state.last;
  byId("undo").disabled = last === null;
  if (!item) {
    asked = null;
    byId("send").hidden = true;
  }
  if (fresh) draw();
}

function draw() {
  const kept = JSON.parse(sessionStorage.getItem("draft") ?? "{}");
  draft = kept.showing === item.showing ? kept.draft : [];
  const single = item.kind === "score" && item.completions.length === 1;
  byId("question").textContent = words[single ? "ask_score_one" : `ask_${item.kind}`];
  byId("prompt").replaceChildren(...promptOf(item));
  byId("send").hidden = item.kind === "compare";
  byId("answer").replaceChildren();
  byId("item").dataset.kind = item.kind;
  asked = null;
  asked = kinds[item.kind](item, byId("answer"), draft, changed, (value) => send(item.kind, value));
  byId("keys").textContent = [...asked.keys, words.keys_all].join(words.comma);
  changed();
  seconds = 0;
  since = document.hidden ? null : performance.now();
  scrollTo(0, 0);
}

function changed() {
  sessionStorage.setItem("draft", JSON.stringify({ showing: item.showing, draft }));
  byId("send").disabled = !asked || asked.value() === null;
}

async function exchange(path, body, message) {
  if (busy) return;
  busy = true;
  document.body.classList.add("busy");
  try {
    const state = await call(path, body);
    show(state);
    say(message(state));
  } catch (error) {
    say(`${words.not_saved} (${error.message})`, true);
  } finally {
    busy = false;
    document.body.classList.remove("busy");
  }
}

function send(kind, value) {
  if (!item || (kind !== "skip" && value === null)) return;
  const body = { showing: item.showing, kind, value, seconds: Math.round(looked() * 10) / 10 };
  exchange("/api/answer", body, () => (kind === "skip" ? words.skipped : words.saved));
}

const submit = () => asked && send(item.kind, asked.value());
const skip = () => send("skip", null);
const undo = () => (last === null ? say(words.nothing_to_undo) : exchange("/api/undo", { answer: last }, () => words.undone));

byId("send").addEventListener("click", submit);
byId("skip").addEventListener("click", skip);
byId("undo").addEventListener("click", undo);

addEventListener("keydown", (event) => {
  const isUndo = event.key.toLowerCase() === "z" && (event.ctrlKey || event.metaKey);
  if (event.altKey || ((event.ctrlKey || event.metaKey) && !isUndo)) return;
  if (event.repeat && !event.key.startsWith("Arrow")) return; // a key that is held down answers only once
  if (event.repeat && item?.kind === "compare") return;
  const onButton = event.key === "Enter" && event.target.closest("button, a");
  if (onButton) return;
  if (isUndo || event.key.toLowerCase() === "u") undo();
  else if (item && event.key.toLowerCase() === "s") skip();
  else if (item && event.key === "Enter") submit();
  else if (!asked?.key(event)) return;
  event.preventDefault();
});

document.addEventListener("visibilitychange", () => {
  seconds = looked();
  since = document.hidden ? null : performance.now();
});

exchange("/api/next", {}, () => "");
setInterval(() => {
  if (!item && !document.hidden) exchange("/api/next", {}, () => "");
}, POLL);
