// Lists whose rows can be dragged up and down, by mouse, pen or finger.

// Calls moved(from, to) with a row's old and new index when it is dropped at another one.
export function draggable(list, moved) {
  list.addEventListener("pointerdown", (down) => {
    const row = down.target.closest("li");
    if (!row || down.button !== 0) return;
    down.preventDefault(); // or the browser would select text
    const rows = [...list.children];
    const from = rows.indexOf(row);
    const middles = rows.map((one) => one.getBoundingClientRect()).map((box) => box.top + box.height / 2);
    let to = from;

    const move = (event) => {
      const shift = event.clientY - down.clientY;
      row.style.transform = `translateY(${shift}px)`;
      const middle = middles[from] + shift;
      to = middles.filter((other, place) => place !== from && other < middle).length;
      const step = row.getBoundingClientRect().height + 6;
      rows.forEach((other, place) => {
        if (other === row) return;
        const up = place > from && place <= to;
        const lower = place < from && place >= to;
        other.style.transform = up ? `translateY(${-step}px)` : lower ? `translateY(${step}px)` : "";
      });
    };
    const end = (event) => {
      removeEventListener("pointermove", move);
      removeEventListener("pointerup", end);
      removeEventListener("pointercancel", end);
      row.classList.remove("dragged");
      rows.forEach((one) => (one.style.transform = ""));
      if (event.type === "pointerup" && to !== from) moved(from, to);
    };
    row.classList.add("dragged");
    addEventListener("pointermove", move);
    addEventListener("pointerup", end);
    addEventListener("pointercancel", end);
  });
}
