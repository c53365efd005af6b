// LoRAs of a request: names of GET /loras and of those that the host was started with, each with a scale.

import { byId, button, element } from "./dom.js";
import { get, launch } from "./host.js";

const known = new Map(); // name -> { title, base, trigger_words, scale }
const chosen = new Map(); // name -> its number input

export async function buildLoras() {
  if (!launch.fields.lora_scales) return;
  byId("lora-add").addEventListener("click", addTyped);
  byId("lora_scales").addEventListener("focus", refresh);
  byId("lora_scales").addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault(); // it would send the form
    addTyped();
  });
  await refresh();
}

async function refresh() {
  const listed = await get("loras").catch(() => ({ loras: [] }));
  const loaded = await get("lora").catch(() => ({ loras: [] })); // a host that still loads has none
  known.clear();
  for (const { path, scale } of loaded.loras) {
    known.set(path.split("/").pop().replace(/\.safetensors$/, ""), { scale });
  }
  for (const file of listed.loras) known.set(file.name, { ...known.get(file.name), ...file });
  const options = [...known].map(([name, told]) => element("option", { value: name }, about(told)));
  byId("lora-names").replaceChildren(...options);
  showSection();
}

function showSection() {
  byId("loras").hidden = !known.size && !chosen.size;
  const count = chosen.size ? `LoRAs, ${chosen.size} chosen` : "LoRAs";
  byId("loras").querySelector("summary").textContent = count;
}

function about({ title, base, scale }) {
  return [title, base, scale !== undefined && `loaded at scale ${scale}`].filter(Boolean).join(" · ");
}

function addTyped() {
  const name = byId("lora_scales").value.trim().replace(/\.safetensors$/, "");
  if (!name) return;
  const there = known.has(name);
  byId("lora_scales-problem").textContent = there ? "" : `this host has no LoRA ${name}`;
  if (!there) return;
  byId("lora_scales").value = "";
  add(name, known.get(name).scale ?? 1).focus();
}

function add(name, scale) {
  if (chosen.has(name)) return chosen.get(name);
  const told = known.get(name) ?? {};
  const control = element("input", { type: "number", step: 0.05, inputmode: "decimal", "aria-label": `Scale of ${name}` });
  control.value = scale;
  const remove = button("Remove", () => {
    chosen.delete(name);
    item.remove();
    showSection();
    byId("lora_scales").focus();
  });
  remove.setAttribute("aria-label", `Remove ${name}`);
  const words = (told.trigger_words ?? []).map((word) =>
    button(word, () => addToPrompt(word), { class: "chip", title: "Add to the prompt" }),
  );
  const head = element("span", {}, name, element("small", { class: "hint" }, about(told)));
  const item = element(
    "li",
    {},
    element("div", { class: "row" }, head, control, remove),
    ...(words.length ? [element("div", { class: "chips" }, ...words)] : []),
  );
  byId("lora-list").append(item);
  chosen.set(name, control);
  showSection();
  return control;
}

function addToPrompt(word) {
  const prompt = byId("positive");
  prompt.value = prompt.value.trim() ? `${prompt.value.trim()}, ${word}` : word;
}

// `lora_scales`, null without any, and the name of one whose scale is no number.
export function readLoras() {
  const scales = [...chosen].map(([name, control]) => [name, control.valueAsNumber]);
  const [wrong] = scales.find(([, scale]) => Number.isNaN(scale)) ?? [];
  return { scales: scales.length ? Object.fromEntries(scales) : null, wrong };
}

export function fillLoras(scales) {
  chosen.clear();
  byId("lora-list").replaceChildren();
  for (const [name, scale] of Object.entries(scales)) add(name, scale);
  if (chosen.size) byId("loras").open = true;
  showSection();
}
