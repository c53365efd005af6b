// Talking to the host: requests with the token, and errors in its words.

import { byId } from "./dom.js";

export const launch = {}; // GET /launch, once it is known

export class HostError extends Error {
  constructor(status, message, errors = []) {
    super(message);
    this.status = status;
    this.errors = errors;
  }
}

export async function call(path, options = {}) {
  const headers = { ...options.headers };
  const token = sessionStorage.getItem("token");
  if (token) {
    // A header holds bytes; the host compares them with its key in UTF-8.
    headers.Authorization = "Bearer " + String.fromCharCode(...new TextEncoder().encode(token));
  }
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new HostError(0, "The host cannot be reached. Is it still running?");
  }
  if (response.ok) return response;
  const answer = await response.json().catch(() => ({}));
  if (response.status === 401) lock(token ? "The host refuses this token." : "");
  const fallback = `The host answered ${response.status} ${response.statusText}.`;
  const errors = Array.isArray(answer.errors) ? answer.errors : [];
  throw new HostError(response.status, answer.message || answer.detail || fallback, errors);
}

export async function post(path, body, options = {}) {
  const headers = { "Content-Type": "application/json", ...options.headers };
  return (await call(path, { ...options, method: "POST", headers, body: JSON.stringify(body) })).json();
}

export async function get(path) {
  return (await call(path)).json();
}

function lock(problem) {
  document.dispatchEvent(new Event("locked"));
  byId("main").hidden = true;
  byId("unlock").hidden = false;
  byId("token-problem").textContent = problem;
  setState("locked", "");
  byId("token").focus();
}

export function setState(state, message) {
  byId("state").textContent = state;
  byId("state").dataset.state = state;
  byId("host-message").textContent = message;
}

export function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new HostError(0, "A picture of this request can no longer be read."));
    reader.readAsDataURL(file);
  });
}

export function fileOf(base64, format) {
  const type = format === "mp4" ? "video/mp4" : `image/${format}`;
  return new Blob([Uint8Array.from(atob(base64), (character) => character.charCodeAt(0))], { type });
}
