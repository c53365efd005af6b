// What every part of the page needs of the document. Texts become text nodes, never markup.

export const byId = (id) => document.getElementById(id);

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

export function button(text, act, attributes = {}) {
  const made = element("button", { type: "button", ...attributes }, text);
  made.addEventListener("click", act);
  return made;
}

export function say(text) {
  byId("status").textContent = text;
}

export function dialogIsOpen() {
  return document.querySelector("dialog[open]") !== null;
}

export function short(text, most = 60) {
  return text.length > most ? `${text.slice(0, most - 1)}…` : text;
}

// A message as a sentence: the host's have no capital and no full stop.
export function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1) + (/[.?!]$/.test(text) ? "" : ".");
}
