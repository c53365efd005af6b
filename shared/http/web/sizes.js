// Sizes to choose from: those of the type, and the input picture's.

import { byId, element } from "./dom.js";
import { launch } from "./host.js";
import { picked } from "./pictures.js";

export function sizeField() {
  const select = element("select", { id: "size" });
  select.addEventListener("change", () => {
    if (select.value) setSize(...select.value.split(" ").map(Number));
  });
  document.addEventListener("picture", ({ detail: { name, pictures, byHand } }) => {
    if (name !== "image") return;
    if (byHand) {
      if (pictures.length) follow(pictures[0]);
      else setSize(launch.defaults.width, launch.defaults.height);
    }
    showSizes();
  });
  for (const side of ["width", "height"]) {
    byId("form").addEventListener("input", (event) => event.target.id === side && showSizes());
    byId("form").addEventListener("change", (event) => event.target.id === side && showSizes());
  }
  queueMicrotask(showSizes); // when the fields of width and height are there
  return [element("div", { class: "field wide" }, element("label", { for: "size" }, "Size"), select)];
}

// A size of the picture's shape stays, as one from the settings of another picture.
function follow(picture) {
  const shape = byId("width").valueAsNumber / byId("height").valueAsNumber;
  if (!(Math.abs((shape * picture.height) / picture.width - 1) < 0.02)) setSize(...fitting(picture));
}

function setSize(width, height) {
  byId("width").value = width;
  byId("height").value = height;
  showSizes();
}

function showSizes() {
  const options = [element("option", { value: "" }, "as below")];
  const add = (text, [width, height]) =>
    options.push(element("option", { value: `${width} ${height}` }, `${text}${width} × ${height}`));
  for (const [width, height] of launch.sizes) add(shape(width, height), [width, height]);
  const picture = picked("image")[0];
  if (picture?.width) add("as the picture: ", whole(picture.width, picture.height));
  const now = `${byId("width").value} ${byId("height").value}`;
  byId("size").replaceChildren(...options);
  byId("size").value = options.some((one) => one.value === now) ? now : "";
}

function shape(width, height) {
  return width === height ? "square, " : width > height ? "wide, " : "tall, ";
}

// The picture's shape in as many pixels as the launch's own size has, at most its own size.
function fitting({ width, height }) {
  const most = launch.defaults.width * launch.defaults.height;
  const scale = Math.min(1, Math.sqrt(most / (width * height)));
  return whole(width * scale, height * scale);
}

function whole(...sides) {
  const { minimum, maximum } = launch.fields.width;
  const multiple = launch.size_multiple;
  return sides.map((side) => Math.min(Math.max(multiple * Math.floor(side / multiple + 1e-6), minimum), maximum));
}
