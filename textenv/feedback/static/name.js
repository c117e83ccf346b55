// Asks for the rater's name once; the server keeps it in a cookie.

import { byId, call } from "./page.js";

byId("name").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    await call("/api/rater", { rater: byId("rater").value });
    location.reload();
  } catch (error) {
    byId("status").textContent = error.message;
  }
});
