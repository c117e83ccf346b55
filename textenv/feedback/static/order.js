// Lists whose rows can be dragged up and down, by mouse, pen or finger.

// Calls moved(from, to) with a row's old and new index when it is dropped at another one.
export function draggable(list, moved) {
  list.addEventListener("pointerdown", (down) => {
    const row = down.target.closest("li");
    if (!row || down.button !== 0) return;
    down.preventDefault(); // otherwise the browser would select text
    const rows = [...list.children];
    const from = rows.indexOf(row);
    const middles = rows.map((other) => other.getBoundingClientRect()).map((box) => box.top + box.height / 2);
    let to = from;

    const move = (event) => {
      const shift = event.clientY - down.clientY;
      row.style.transform = `translateY(${shift}px)`;
      const middle = middles[from] + shift;
      to = middles.filter((other, index) => index !== from && other < middle).length;
      const step = row.getBoundingClientRect().height + 6;
      rows.forEach((other, index) => {
        if (other === row) return;
        const up = index > from && index <= to;
        const lower = index < from && index >= to;
        other.style.transform = up ? `translateY(${-step}px)` : lower ? `translateY(${step}px)` : "";
      });
    };
    const end = (event) => {
      removeEventListener("pointermove", move);
      removeEventListener("pointerup", end);
      removeEventListener("pointercancel", end);
      row.classList.remove("dragged");
      rows.forEach((other) => (other.style.transform = ""));
      if (event.type === "pointerup" && to !== from) moved(from, to);
    };
    row.classList.add("dragged");
    addEventListener("pointermove", move);
    addEventListener("pointerup", end);
    addEventListener("pointercancel", end);
  });
}
