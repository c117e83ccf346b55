// Functions that all pages share. Prompts, messages and completions are only ever inserted as text nodes, never as markup.

export const words = JSON.parse(document.getElementById("app").dataset.words);
export const byId = (id) => document.getElementById(id);

export function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.textContent = text;
  return made;
}

// A completion often starts with the space between prompt and completion, which its own box does not need.
export const trimmed = (text) => text.replace(/^ /, "");

// The elements that show a prompt: its text, or each message of a chat below its role.
export function promptOf({ prompt, messages }) {
  if (!messages) return [document.createTextNode(prompt)];
  return messages.map(({ role, content }) => {
    const made = element("div", "message");
    made.append(element("div", "role", role), element("div", "content", content));
    return made;
  });
}

// Posts an object, or gets one if there is no `body`; throws the server's error.
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
