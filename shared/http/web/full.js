// A picture in full size, and the way from it to those before and after it.

import { byId } from "./dom.js";
import { neighbour, select } from "./history.js";
import { media, shown } from "./stage.js";

export function openFull() {
  byId("full-size").addEventListener("click", () => {
    fill();
    byId("full").showModal();
  });
  byId("full-newer").addEventListener("click", () => step(-1));
  byId("full-older").addEventListener("click", () => step(1));
  byId("full-fit").addEventListener("click", () => {
    const isWhole = byId("full").classList.toggle("pixels");
    byId("full-fit").setAttribute("aria-pressed", String(isWhole));
  });
  byId("full").addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
}

function fill() {
  const picture = media(shown, { alt: shown.record.body.positive ?? "The picture" });
  if (shown.record.format === "mp4") picture.controls = true;
  byId("full-picture").replaceChildren(picture);
  byId("full-facts").textContent = `Seed ${shown.seed} · ${shown.record.width} × ${shown.record.height}`;
  byId("full-newer").disabled = !neighbour(-1);
  byId("full-older").disabled = !neighbour(1);
}

function step(by) {
  const next = neighbour(by);
  if (!next) return;
  select(next);
  fill();
}
