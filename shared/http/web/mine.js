// This browser's requests, kept over a reload for as long as the host knows them.

import { requests as place } from "./store.js";

// By id: { id, at, body, inputs, isAccepted, isOver, lost }. `lost`: why there will be no picture of it.
export const mine = new Map();
const tabs = new BroadcastChannel("requests"); // other tabs of this page; a message is the id of what changed

export async function openMine() {
  tabs.addEventListener("message", async ({ data: id }) => {
    const entry = await place.read(id).catch(() => mine.get(id));
    if (entry) mine.set(id, entry);
    else mine.delete(id);
    changed();
  });
  const kept = await place.readAll().catch(() => []); // the history says that this browser keeps nothing
  for (const entry of kept) if (!mine.has(entry.id)) mine.set(entry.id, entry);
}

function changed() {
  document.dispatchEvent(new Event("requests"));
}

// Returns whether a reload finds it.
export function remember(entry) {
  mine.set(entry.id, entry);
  return save(entry.id, () => place.write(entry));
}

export async function note(id, news) {
  if (mine.has(id)) await remember({ ...mine.get(id), ...news });
}

export function forget(id) {
  mine.delete(id);
  return save(id, () => place.remove(id));
}

async function save(id, deed) {
  changed();
  try {
    await deed();
  } catch {
    return false;
  }
  tabs.postMessage(id);
  return true;
}
