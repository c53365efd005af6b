// "Use these settings": from a picture of the history, or from what a picture's file tells of itself.

import { byId, say } from "./dom.js";
import { fillForm } from "./form.js";
import { dataUrl, launch, post } from "./host.js";
import { choose, measured } from "./pictures.js";
import { shown } from "./stage.js";

const OURS = "multigpu_diffusion"; // a body of POST /generate
// A1111's names -> ours, of what means the same there and here.
const THEIRS = {
  Prompt: "positive",
  "Negative prompt": "negative",
  Steps: "steps",
  "CFG scale": "cfg",
  Seed: "seed",
  "Size-1": "width",
  "Size-2": "height",
};
const LORA = /<lora:([^:>]+):(-?[\d.]+)(?::[^>]*)?>/g;

export function openSettings() {
  byId("reuse").addEventListener("click", reuse);
  byId("copy-seed").addEventListener("click", copySeed);
  byId("start-from").addEventListener("click", startFromShown);
  byId("read-settings").addEventListener("click", () => byId("settings-file").click());
  byId("settings-file").addEventListener("change", async () => {
    const [file] = byId("settings-file").files;
    if (file) await readPicture(file);
    byId("settings-file").value = "";
  });
}

async function reuse() {
  const { record, seed } = shown;
  await useAgain({ ...record.body, seed, pictures: 1 }, record.inputs, `The form has the settings of seed ${seed}.`);
}

// Fill the form with what was asked for, its pictures included.
export async function useAgain(body, kept, said) {
  const inputs = {};
  for (const [name, pictures] of Object.entries(kept)) {
    inputs[name] = await Promise.all(pictures.map(({ file, name }) => measured(file, name)));
  }
  use(body, inputs, said);
}

function use(body, inputs, said) {
  const lost = fillForm(body, inputs);
  say([said, lost.length && `Not all of them: ${lost.join("; ")}.`].filter(Boolean).join(" "));
  document.querySelector("#fields textarea, #fields input").focus();
}

// Read what a file tells, and fill the form with it.
export async function readPicture(file) {
  let told;
  try {
    told = await post("sdapi/v1/png-info", { image: await dataUrl(file) });
  } catch (error) {
    say(`${file.name} cannot be read: ${error.message}`);
    return;
  }
  const body = ours(told.items?.[OURS]) ?? theirs(told.parameters ?? {});
  if (!body) say(`${file.name} does not tell how it was made.`);
  else if (body.seed !== undefined && !Number.isSafeInteger(body.seed)) say(`The seed of ${file.name} is too large for this page.`);
  else use(body, {}, `The form has the settings of ${file.name}.`);
}

function ours(text) {
  try {
    const body = JSON.parse(text);
    return typeof body === "object" && !Array.isArray(body) ? body : null;
  } catch {
    return null;
  }
}

// A body of what A1111 tells; its sampler has no one name here and stays as the form has it.
function theirs(parameters) {
  if (!parameters.Steps) return null;
  const body = {};
  for (const [name, ours] of Object.entries(THEIRS)) {
    const value = parameters[name];
    if (value === undefined || value === "" || !launch.fields[ours]) continue;
    body[ours] = launch.fields[ours].kind === "number" ? Number(value) : value;
  }
  const loras = [...(body.positive ?? "").matchAll(LORA)];
  if (loras.length) {
    body.lora_scales = Object.fromEntries(loras.map(([, name, scale]) => [name, Number(scale)]));
    body.positive = body.positive.replace(LORA, "").trim();
  }
  if (launch.fields.clip_skip) body.clip_skip = Number(parameters["Clip skip"] ?? 1) - 1; // theirs counts from 1
  if (launch.fields.prompt_syntax) body.prompt_syntax = "a1111";
  return body;
}

async function copySeed() {
  const seed = String(shown.seed);
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(seed);
  } else {
    // Only pages of localhost and of https have a clipboard; others copy what is marked.
    const field = document.createElement("textarea");
    field.value = seed;
    byId("result").append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
    byId("copy-seed").focus();
  }
  say(`Seed ${seed} is copied.`);
}

async function startFromShown() {
  await choose("image", [{ file: shown.file, name: `seed ${shown.seed}` }]);
  byId("image-chosen").querySelector("button").focus();
  byId("image-chosen").scrollIntoView({ block: "center" });
}
