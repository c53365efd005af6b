// The form, made from GET /launch: building it, reading it, filling it, and problems beside their fields.

import { byId, button, element } from "./dom.js";
import { launch } from "./host.js";
import { fillLoras, readLoras } from "./loras.js";
import { picked, pictureField, pictureFields, setPictures } from "./pictures.js";
import { sizeField } from "./sizes.js";

// The fields that are shown at once, in this order; all others that have a label stand under "more".
const FIRST = [
  ...["positive", "negative", "image", "mask", "strength", "control_image", "ip_image", "width", "height"],
  ...["frames", "fps", "steps", "cfg", "seed", "pictures"],
];
// What means something only beside a picture is shown with it.
const BESIDE = {
  ...{ mask: "image", strength: "image", image_scale: "image" },
  ...{ control_image_scale: "control_image", ip_image_scale: "ip_image" },
};
const EMPTY = { seed: "drawn", scheduler: "default" }; // what an empty field means
const KINDS = ["text", "image", "number", "choice"]; // that the form has controls for

let controls = []; // [request field, what the launch tells of it], in the form's order
let extras = {}; // settings of a picture that have no control here; they are sent along

export function buildForm() {
  const told = launch.fields;
  const more = Object.keys(told).filter((name) => !FIRST.includes(name));
  controls = [...FIRST, ...more]
    .filter((name) => told[name] && told[name].label && KINDS.includes(told[name].kind))
    .map((name) => [name, told[name]]);
  for (const [name, options] of controls) {
    const field = fieldOf(name, options);
    if (name === "width") byId("fields").append(...sizeField());
    byId(FIRST.includes(name) ? "fields" : "more-fields").append(field);
  }
  if (byId("pictures")) byId("pictures").value = 1;
  byId("more").hidden = !byId("more-fields").children.length;
  document.addEventListener("picture", showBeside);
  showBeside();
}

function fieldOf(name, options) {
  const { kind, label, unit } = options;
  const notes = [unit, launch.needs.includes(name) && "needed"].filter(Boolean).join(", ");
  const wide = kind === "text" || kind === "image" || name === "strength";
  const parts = kind === "image" ? pictureField(name, { most: options.most ?? 1 }) : makeControl(name, options);
  const field = element("div", { class: wide ? "field wide" : "field", "data-drop": kind === "image" && name });
  field.append(
    element("label", { for: name }, `${label} `, notes && element("small", {}, notes)),
    ...parts,
    element("p", { id: `${name}-problem`, class: "problem" }),
  );
  field.querySelector(`#${name}`).setAttribute("aria-describedby", `${name}-problem`);
  return field;
}

function makeControl(name, { kind, choices, minimum, maximum, step }) {
  if (kind === "text") return [element("textarea", { id: name, rows: name === "positive" ? 4 : 2 })];
  if (kind === "choice") {
    const control = element("select", { id: name });
    if (EMPTY[name]) control.append(element("option", { value: "" }, EMPTY[name]));
    for (const choice of choices) control.append(element("option", { value: choice }, choice));
    return [control];
  }
  // An input counts its steps from its least value, which must then be a number that JavaScript has.
  const exact = (bound) => (Number.isInteger(bound) && !Number.isSafeInteger(bound) ? undefined : bound);
  const fine = minimum === 0 && maximum === 1 ? 0.05 : "any"; // of a fraction
  const bounds = { min: exact(minimum), max: exact(maximum), step: step ?? fine, placeholder: EMPTY[name] };
  const control = element("input", { id: name, type: "number", inputmode: "decimal", ...bounds });
  if (launch.defaults[name] !== undefined) control.value = launch.defaults[name];
  if (name !== "strength") return [control];
  const slider = element("input", { type: "range", min: 0.05, max: 1, step: 0.05, "aria-label": "Strength, slider" });
  slider.addEventListener("input", () => {
    control.value = slider.value;
  });
  const follow = () => {
    const usual = launch.strengths[picked("mask").length ? "mask" : "image"] ?? 1;
    control.placeholder = usual;
    slider.value = control.value || usual;
  };
  for (const event of ["input", "change"]) control.addEventListener(event, follow);
  document.addEventListener("picture", follow);
  follow();
  return [element("div", { class: "linked" }, slider, control)];
}

function fieldFor(name) {
  return byId(name)?.closest(".field");
}

function isShown(name) {
  return !fieldFor(name).hidden;
}

function showBeside() {
  const frames = picked("image").length;
  // Of a picture that the model only looks at, no part of the schedule is left out.
  BESIDE.strength = "image" in launch.strengths ? "image" : "mask";
  if (frames > 1 && byId("frames")) byId("frames").value = frames;
  for (const [name, picture] of Object.entries(BESIDE)) {
    if (fieldFor(name)) fieldFor(name).hidden = !picked(picture).length;
  }
}

// What the form says: the body of POST /generate without its pictures, and those by their field.
export function readForm() {
  const body = { ...extras };
  const inputs = {};
  let wrong = null;
  for (const [name, { kind }] of controls) {
    const control = byId(name);
    if (!isShown(name)) continue;
    if (kind === "image") {
      if (picked(name).length) inputs[name] = picked(name).map(({ file, name }) => ({ file, name }));
    } else if (kind === "number") {
      const value = control.valueAsNumber;
      const unsafe = Number.isInteger(value) && !Number.isSafeInteger(value);
      if (control.validity.badInput || unsafe) {
        problemAt(name, unsafe ? "is too large for this page" : "must be a number");
        wrong ??= control;
      } else if (!Number.isNaN(value)) body[name] = value;
    } else if (control.value.trim() && !(name in extras)) body[name] = control.value;
  }
  const loras = readLoras();
  if (loras.scales) body.lora_scales = loras.scales;
  if (loras.wrong) {
    problemAt("lora_scales", `the scale of ${loras.wrong} must be a number`);
    wrong ??= byId("lora_scales");
  }
  return { body, inputs, wrong };
}

// Fill the form with a request's body and pictures; returns what it could not take, in words.
export function fillForm(body, inputs = {}) {
  const lost = [];
  extras = {};
  for (const name of Object.keys(inputs)) {
    if (!pictureFields().includes(name)) lost.push(`${name} is not taken by this host`);
  }
  for (const name of pictureFields()) {
    setPictures(name, (inputs[name] ?? []).map((one) => ({ ...one })).slice(-(launch.fields[name].most ?? 1)));
    if (body[name] && !inputs[name]) lost.push(`the ${launch.fields[name].label} is not in the file`);
  }
  for (const [name, { kind }] of controls) {
    if (kind === "image") continue;
    const value = body[name] ?? "";
    const control = byId(name);
    control.value = typeof value === "object" ? "" : String(value);
    control.dispatchEvent(new Event("change"));
    if (value !== "" && control.value !== String(value)) extras[name] = value; // a scheduler with its settings
  }
  fillLoras(body.lora_scales ?? {});
  for (const [name, value] of Object.entries(body)) {
    if (value === null || name === "lora_scales" || name in inputs || controls.some(([one]) => one === name)) continue;
    if (!Object.hasOwn(launch.fields, name)) lost.push(`${name} is not taken by this host`);
    else if (value === "(left out)") lost.push(`its ${name} is not in the file`);
    else extras[name] = value;
  }
  showExtras();
  return lost;
}

function showExtras() {
  const items = Object.entries(extras).map(([name, value]) => {
    const text = typeof value === "object" ? JSON.stringify(value) : String(value);
    const remove = button("Remove", () => {
      delete extras[name];
      showExtras();
    });
    remove.setAttribute("aria-label", `Remove ${name}`);
    return element("li", { class: "row" }, element("span", {}, element("code", {}, name), ` ${text}`), remove);
  });
  byId("extras").replaceChildren(...items);
  byId("extras-note").hidden = !items.length;
}

export function problemAt(name, problem) {
  byId(`${name}-problem`).textContent = problem;
  byId(name).setAttribute("aria-invalid", "true");
}

export function clearProblems() {
  byId("error").textContent = "";
  for (const control of document.querySelectorAll("[aria-invalid]")) {
    control.removeAttribute("aria-invalid");
    byId(`${control.id}-problem`).textContent = "";
  }
}

export function tellError(error) {
  const elsewhere = [];
  let first = null;
  for (const { field, problem } of error.errors ?? []) {
    const name = field.split(".")[0];
    if (byId(`${name}-problem`) && byId(name)) {
      problemAt(name, problem);
      if (fieldFor(name)) fieldFor(name).hidden = false;
      first ??= byId(name);
    } else elsewhere.push(field ? `${field}: ${problem}` : problem);
  }
  if (first) {
    goTo(first);
    elsewhere.unshift("The host refuses these settings: see the marked fields.");
  }
  byId("error").textContent = elsewhere.join(" ") || error.message;
}

export function goTo(control) {
  control.closest("details")?.setAttribute("open", "");
  control.focus();
}
