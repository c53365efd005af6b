// The history: pictures with their settings, newest first, kept over a reload.

import { byId, element, say } from "./dom.js";
import { forget, media, show, shown } from "./stage.js";
import { BlockedError, history as store } from "./store.js";

const KEPT = 200; // pictures
const PAGE = 24; // pictures that are shown at first, and more at a time

export let entries = []; // one a picture: { record, file, seed, url }, newest first
let most = PAGE;
let isKept = true; // whether the browser keeps it
const tabs = new BroadcastChannel("history"); // other tabs of this page

export async function openHistory() {
  byId("more-history").addEventListener("click", () => {
    most += PAGE;
    list();
    byId("history").children[most - PAGE]?.firstChild.focus();
  });
  byId("delete").addEventListener("click", () => removePicture(shown));
  byId("clear-history").addEventListener("click", () => byId("clear").showModal());
  byId("clear").addEventListener("close", () => {
    if (byId("clear").returnValue === "yes") clear();
    byId("clear").returnValue = "";
  });
  tabs.addEventListener("message", load);
  await load();
}

async function load() {
  try {
    const records = (await store.readAll()).sort((one, other) => other.at - one.at);
    const old = new Map(entries.map((entry) => [keyOf(entry), entry]));
    entries = records.flatMap(entriesOf).map((entry) => {
      const known = old.get(keyOf(entry));
      if (!known) return entry;
      URL.revokeObjectURL(entry.url);
      return Object.assign(known, { record: entry.record });
    });
    for (const entry of old.values()) if (!entries.includes(entry)) URL.revokeObjectURL(entry.url);
    if (shown && !entries.includes(shown)) forget();
  } catch (error) {
    keepsNothing(error);
  }
  list();
}

const keyOf = ({ record, seed }) => `${record.id} ${seed}`;

function entriesOf(record) {
  return record.pictures.map(({ file, seed }) => ({ record, file, seed, url: URL.createObjectURL(file) }));
}

function keepsNothing(error) {
  isKept = false;
  const older = "An older version of this page is open in another tab";
  const why = error instanceof BlockedError ? older : "This browser has no room for it";
  byId("history-note").textContent = `${why}, so it is kept until this page is closed.`;
}

// The entry of a request's first picture; undefined where it is not there.
export function entryOf(id) {
  return entries.find((entry) => entry.record.id === id);
}

// Keep a request that was answered; returns the entry of its first picture.
export async function keep(record) {
  if (entryOf(record.id)) return entryOf(record.id); // another tab has waited for it too
  entries = [...entriesOf(record), ...entries];
  const [first] = entries;
  list();
  await save(() => store.write(record));
  while (entries.length > KEPT) await removePicture(entries.at(-1));
  return first;
}

async function save(deed) {
  if (!isKept) return;
  try {
    await deed();
    tabs.postMessage("changed");
  } catch (error) {
    keepsNothing(error);
  }
}

async function removePicture(entry) {
  const { record, seed } = entry;
  const place = entries.indexOf(entry);
  entries = entries.filter((one) => one !== entry);
  URL.revokeObjectURL(entry.url);
  record.pictures = record.pictures.filter((picture) => picture.seed !== seed);
  if (entry === shown) {
    const next = entries[Math.min(place, entries.length - 1)];
    if (next) select(next);
    else forget();
  }
  list();
  await save(() => (record.pictures.length ? store.write(record) : store.remove(record.id)));
}

async function clear() {
  for (const entry of entries) URL.revokeObjectURL(entry.url);
  entries = [];
  forget();
  list();
  say("The history is empty.");
  await save(() => store.removeAll());
}

export function select(entry) {
  show(entry);
  list();
  document.dispatchEvent(new Event("selected"));
}

// The entry so many places further; none at the ends.
export function neighbour(by) {
  return entries[entries.indexOf(shown) + by];
}

export function list() {
  byId("history-card").hidden = !entries.length;
  byId("more-history").hidden = entries.length <= most;
  const items = entries.slice(0, most).map((entry) => {
    const { body, format } = entry.record;
    const picture = media(entry, { alt: "", loading: "lazy", decoding: "async" });
    if (format === "mp4") picture.tabIndex = -1;
    const button = element("button", { type: "button", title: body.positive }, picture, `Seed ${entry.seed}`);
    if (entry === shown) button.setAttribute("aria-current", "true");
    button.addEventListener("click", () => {
      const place = entries.indexOf(entry);
      select(entry);
      byId("history").children[place]?.firstChild.focus();
    });
    return element("li", {}, button);
  });
  byId("history").replaceChildren(...items);
}
