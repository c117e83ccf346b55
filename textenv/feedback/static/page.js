// What all pages share. Texts of prompts and completions only ever become text nodes, never markup.

export const words = JSON.parse(document.getElementById("app").dataset.words);
export const byId = (id) => document.getElementById(id);

export function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.textContent = text;
  return made;
}

// A completion starts where the prompt ends, often with the space between them, which its own box makes superfluous.
export const trimmed = (text) => text.replace(/^ /, "");

// Sends an object, or asks for one where there is none to send; throws what the server says is wrong.
export async function call(path, body) {
  const send = { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
  const response = await fetch(path, body === undefined ? {} : send);
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

const leave = byId("leave");
if (leave) {
  leave.addEventListener("click", async () => {
    await call("/api/rater", {});
    location.assign("/");
  });
}
