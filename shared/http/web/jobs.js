// The list of the host's requests, this browser's first. It is read again when the events tell of a change.

import { recordOf } from "./answers.js";
import { byId, button, element, say, short } from "./dom.js";
import { tellError } from "./form.js";
import { entryOf, keep, select } from "./history.js";
import { call, get } from "./host.js";
import { forget, mine } from "./mine.js";
import { add, isStopped, isUnsent, jobs, standing, stopMine, titleOf } from "./queue.js";
import { useAgain } from "./settings.js";

const GAP = 1000; // milliseconds between two readings
const TRIES = 5; // readings until the host has written what its events have told
const OVER = 100; // finished ones that are read
const PAGE = 6; // rows of each part that are shown at first, and more at a time
const RANKS = ["lost", "running", "queued", "sent", "unsent"]; // in this order; what is over comes last

let listed = new Map(); // by id what GET /jobs told
let readAt = 0; // when, by the browser's clock
let seen = ""; // the state of events and of this browser's requests that it was read for
let isStale = false;
let isReading = false;
let tries = 0;
let most = PAGE;
const rows = new Map(); // by id: { item, words, key }

export function openJobs() {
  document.addEventListener("requests", () => {
    const own = [...mine.values()].map(({ id, isAccepted, isOver }) => [id, isAccepted, isOver]);
    const news = JSON.stringify([jobs.running?.id, jobs.waiting, own]);
    if (news !== seen) refreshJobs();
    seen = news;
    render();
  });
  byId("more-jobs").addEventListener("click", () => {
    most += PAGE;
    render();
  });
}

export async function refreshJobs() {
  isStale = true;
  tries = TRIES;
  if (isReading) return;
  isReading = true;
  while (isStale) {
    isStale = false;
    await read();
    render();
    await new Promise((resolve) => setTimeout(resolve, GAP));
  }
  isReading = false;
}

async function read() {
  const over = [...mine.values()].filter(({ isOver }) => isOver);
  let told;
  try {
    told = (await get(`jobs?limit=${Math.min(OVER + jobs.waiting.length, 1000)}`)).jobs;
    byId("jobs-problem").textContent = "";
  } catch (error) {
    byId("jobs-problem").textContent = `The list may be old: ${error.message}`;
    return;
  }
  readAt = Date.now();
  listed = new Map(told.map((job) => [job.id, job]));
  for (const { id } of over) if (!listed.has(id)) forget(id); // the host has forgotten it too
  const isAhead = ({ id, finished }) => finished === null && id !== jobs.running?.id && !jobs.waiting.includes(id);
  if (told.some(isAhead) && tries-- > 0) isStale = true;
}

// What is shown of one: its rank, title, state in words, and buttons [name, act, isDisabled].

function stateOf(id, entry, job) {
  if (job?.finished) return job.state;
  if (jobs.running?.id === id) return "running";
  if (standing(id)) return "queued";
  if (job) return job.state;
  if (entry.lost) return "lost";
  return isUnsent(id) ? "unsent" : entry.isOver ? "over" : "sent";
}

function rowOf(id) {
  const entry = mine.get(id);
  const job = listed.get(id);
  const state = stateOf(id, entry, job);
  return {
    id,
    state,
    at: job ? 1000 * job.accepted : entry.at,
    place: jobs.waiting.indexOf(id),
    title: entry ? titleOf(entry) : short(job.prompt || "without a prompt"),
    told: wordsOf(id, state, entry, job),
    buttons: entry ? buttonsOf(entry, state) : [],
  };
}

function wordsOf(id, state, entry, job) {
  const left = job?.wait_estimate == null ? 0 : job.wait_estimate - (Date.now() - readAt) / 1000;
  const soon = left >= 1 ? `, about ${duration(left)} left` : "";
  switch (state) {
    case "running":
      return `Drawing, ${Math.floor(jobs.running?.id === id ? jobs.running.progress : job.progress)} %${soon}`;
    case "queued":
      return (standing(id) ?? "Queued") + soon;
    case "done":
      return `Done at ${clock(job.finished)}${job.pictures > 1 ? `, ${job.pictures} pictures` : ""}`;
    case "failed":
      return `Failed: ${job.message}`;
    case "cancelled":
      return `Cancelled at ${clock(job.finished)}`;
    case "lost":
      return `${entry.lost} Send it again?`;
    default:
      return state === "unsent" ? "Not sent yet" : "Sent";
  }
}

function buttonsOf(entry, state) {
  const { id } = entry;
  const reuse = ["Use these settings", () => useAgain(entry.body, entry.inputs, "The form has the settings of that request.")];
  switch (state) {
    case "done":
      return [["Show", () => open(entry)], ["Forget", () => discard(id)]];
    case "failed":
    case "cancelled":
      return [reuse, ["Forget", () => discard(id)]];
    case "lost":
      return [["Send again", () => sendAgain(entry)], reuse, ["Remove", () => forget(id)]];
    case "unsent":
      return [["Remove", () => stopMine(id)]];
    default:
      return [["Cancel", () => stopMine(id), isStopped(id)]];
  }
}

function sendAgain({ id, body, inputs }) {
  add(body, inputs);
  forget(id);
  say("Sent again.");
}

async function open(entry) {
  try {
    select(entryOf(entry.id) ?? (await keep(recordOf((await get(`jobs/${entry.id}`)).answer, entry))));
    byId("stage").scrollIntoView({ block: "nearest" });
  } catch (error) {
    tellError(error);
    refreshJobs();
  }
}

async function discard(id) {
  try {
    await call(`jobs/${id}`, { method: "DELETE" });
    say("The host has forgotten it.");
  } catch (error) {
    if (error.status !== 404) return tellError(error);
  }
  listed.delete(id);
  forget(id);
}

function duration(seconds) {
  return seconds < 100 ? `${Math.round(seconds)} s` : `${Math.round(seconds / 60)} min`;
}

function clock(seconds) {
  const then = new Date(1000 * seconds);
  const day = then.toDateString() === new Date().toDateString() ? undefined : "short";
  return then.toLocaleString([], { dateStyle: day, timeStyle: "short" });
}

// The rows that stay are kept, so that progress moves no focus.

function render() {
  const ids = new Set([...mine.keys(), ...listed.keys()]);
  const shown = [...ids].map(rowOf).filter(({ state }) => state !== "over").sort(compare);
  const own = shown.filter(({ id }) => mine.has(id));
  const others = shown.filter(({ id }) => !mine.has(id));
  fill("mine", own);
  fill("others", others);
  for (const id of rows.keys()) if (!ids.has(id)) rows.delete(id);
  byId("jobs-card").hidden = !shown.length;
  byId("more-jobs").hidden = Math.max(own.length, others.length) <= most;
}

function compare(one, other) {
  const [rank, next] = [one, other].map(({ state }) => (RANKS.indexOf(state) + RANKS.length + 1) % (RANKS.length + 1));
  return rank - next || one.place - other.place || (one.state === "unsent" ? one.at - other.at : other.at - one.at);
}

function fill(part, shown) {
  const list = byId(part);
  byId(`${part}-title`).hidden = !shown.length;
  const items = shown.slice(0, most).map(itemOf);
  if (items.length === list.children.length && items.every((item, place) => item === list.children[place])) return;
  const focused = document.activeElement;
  const at = [...list.children].findIndex((item) => item.contains(focused));
  list.replaceChildren(...items);
  if (at < 0) return;
  if (focused.isConnected) focused.focus();
  else (items[Math.min(at, items.length - 1)]?.querySelector("button") ?? byId("jobs-title")).focus();
}

function itemOf({ id, state, title, told, buttons }) {
  const key = JSON.stringify([title, buttons, mine.has(id)]);
  let row = rows.get(id);
  if (row?.key !== key) {
    const words = element("span", { class: "hint" });
    const made = buttons.map(([name, act, isDisabled]) =>
      button(name, act, { disabled: isDisabled, "aria-label": `${name}: ${title}` }),
    );
    const parts = [element("span", { class: "title" }, title), words, element("span", { class: "buttons" }, ...made)];
    row = { key, words, item: element("li", {}, ...parts) };
    rows.set(id, row);
  }
  row.item.dataset.state = state;
  if (row.words.textContent !== told) row.words.textContent = told;
  return row.item;
}
