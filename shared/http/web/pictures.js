// Picture fields of the form: their pictures come as files, by drop or by paste.

import { byId, button, dialogIsOpen, element } from "./dom.js";

export const ACCEPT = "image/png,image/jpeg,image/webp,image/bmp";

const fields = new Map(); // request field -> { most, pictures: [{ file, name, width, height, url }] }

export const picked = (name) => fields.get(name)?.pictures ?? [];
export const pictureFields = () => [...fields.keys()];

// Changes of a field are told as the event "picture" of the document; `byHand` where a user chose it.
export function setPictures(name, pictures, byHand = false) {
  const field = fields.get(name);
  for (const old of field.pictures) if (!pictures.includes(old)) URL.revokeObjectURL(old.url);
  field.pictures = pictures;
  for (const picture of pictures) picture.url ??= URL.createObjectURL(picture.file);
  showPicked(name);
  document.dispatchEvent(new CustomEvent("picture", { detail: { name, pictures, byHand } }));
}

// Files, each { file, name } or a File, become the field's pictures, behind the others where it takes several.
export async function choose(name, files) {
  const { most, pictures } = fields.get(name);
  byId(`${name}-problem`).textContent = "";
  const added = [];
  const inOrder = [...files].sort((one, other) => one.name.localeCompare(other.name, "en", { numeric: true }));
  for (const given of inOrder) {
    try {
      added.push(await measured(given.file ?? given, given.name));
    } catch {
      byId(`${name}-problem`).textContent = `${given.name} is not a picture that this page can read`;
    }
  }
  if (!added.length) return;
  const all = most > 1 ? [...pictures, ...added] : added;
  if (all.length > most) byId(`${name}-problem`).textContent = `takes at most ${most}; the last are shown`;
  setPictures(name, all.slice(-most), true);
}

export async function measured(file, name) {
  const image = new Image();
  const url = URL.createObjectURL(file);
  image.src = url;
  try {
    await image.decode();
  } catch (error) {
    URL.revokeObjectURL(url);
    throw error;
  }
  return { file, name, url, width: image.naturalWidth, height: image.naturalHeight };
}

export function pictureField(name, { most }) {
  fields.set(name, { most, pictures: [] });
  const input = element("input", { id: name, type: "file", class: "away", accept: ACCEPT, multiple: most > 1 });
  input.addEventListener("change", async () => {
    await choose(name, [...input.files]);
    input.value = ""; // the same file may be chosen again
  });
  const area = element(
    "div",
    { class: "drop" },
    input,
    element("label", { class: "button", for: name }, "Choose"),
    element("span", { class: "hint" }, most > 1 ? "or drop or paste some here" : "or drop or paste it here"),
  );
  return [area, element("div", { id: `${name}-chosen`, class: "chosen", hidden: true })];
}

function showPicked(name) {
  const { pictures, most } = fields.get(name);
  const chosen = byId(`${name}-chosen`);
  chosen.hidden = !pictures.length;
  chosen.classList.toggle("many", pictures.length > 3);
  byId(name).parentElement.hidden = pictures.length >= most;
  chosen.replaceChildren(
    ...pictures.map((picture) => {
      const remove = button("Remove", () => {
        setPictures(name, picked(name).filter((one) => one !== picture), true);
        byId(name).focus();
      });
      remove.setAttribute("aria-label", `Remove ${picture.name}`);
      const size = picture.width ? `${picture.width} × ${picture.height}` : "";
      const about = element("span", {}, picture.name, element("small", { class: "hint" }, size));
      return element("div", { class: "row" }, element("img", { src: picture.url, alt: "" }), about, remove);
    }),
  );
}

// Drop and paste. What falls beside the picture fields, or finds no field, is handed to `elsewhere`.

export function takeDrops(elsewhere) {
  const hasFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  const mark = (event) => {
    const over = event?.target.closest?.("[data-drop]");
    document.body.classList.toggle("dragging", Boolean(event));
    for (const area of document.querySelectorAll("[data-drop]")) area.classList.toggle("over", area === over);
  };
  document.addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    mark(event);
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) mark(null);
  });
  document.addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    mark(null);
    if (dialogIsOpen()) return;
    const files = [...event.dataTransfer.files];
    const name = event.target.closest?.("[data-drop]")?.dataset.drop;
    if (name) choose(name, files);
    else if (files.length) elsewhere(files[0]);
  });
  document.addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])].filter((file) => file.type.startsWith("image/"));
    if (!files.length || dialogIsOpen()) return;
    event.preventDefault();
    const inField = document.activeElement?.closest("[data-drop]")?.dataset.drop;
    const name = inField ?? (fields.has("image") ? "image" : null);
    if (name) choose(name, files);
    else elsewhere(files[0]);
  });
}
