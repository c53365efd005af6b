// This browser's requests: sent in their order, followed, cancelled; and what the host tells of all requests.

import { AWAY, outcome, recordOf } from "./answers.js";
import { byId, dialogIsOpen, say, sentence, short } from "./dom.js";
import { clearProblems, goTo, readForm, tellError } from "./form.js";
import { keep, list } from "./history.js";
import { call, dataUrl, launch, post } from "./host.js";
import { forget, mine, note, openMine, remember } from "./mine.js";
import { restore, show, showPreview, shown } from "./stage.js";

const AT_ONCE = 2; // requests at the host: one is drawn, and the next is there when it is done
const HELD = 5000; // milliseconds until the next try where the host takes none
const ENDED = { done: "is done", cancelled: "was cancelled", failed: "failed" };

// Not yet answered, oldest first: an entry of `mine` with isSent, isStopped, isFound (after a reload), isKept.
const requests = [];
const sent = new Set(); // ids of all requests of this page
export let jobs = { running: null, waiting: [] }; // the newest jobs event
let over = Promise.resolve(); // when all requests that were sent are over
let handed = Promise.resolve(); // when the host has taken or refused all that were sent
let follows = true; // whether the stage shows what forms, not a picture of the history
let heldUntil = 0;
let beside = null; // id of another's request that ran while this page waited; its end is no news here

// The one that is drawn, or else the first.
function front() {
  return requests.find((request) => request.id === jobs.running?.id) ?? requests[0];
}

function ask() {
  clearProblems();
  const { body, inputs, wrong } = readForm();
  if (wrong) return goTo(wrong);
  const before = requests.length;
  if (!before) follows = true;
  add(body, inputs);
  say(before ? `Queued: ${titleOf(requests.at(-1))}` : "Sent.");
  byId("stage").scrollIntoView({ block: "nearest" });
}

export function add(body, inputs) {
  const entry = { id: newId(), at: Date.now(), body, inputs, isAccepted: false };
  const request = { ...entry, isSent: false, isStopped: false, isFound: false, isKept: false };
  requests.push(request);
  request.kept = remember(entry).then((isKept) => Object.assign(request, { isKept }));
  pump();
}

// The requests of before a reload are sent or waited for as if there had been none.
export async function findAgain() {
  await openMine();
  const known = new Set(requests.map(({ id }) => id));
  const found = [...mine.values()].filter((entry) => isOpen(entry) && !known.has(entry.id));
  found.sort((one, other) => one.at - other.at);
  requests.unshift(...found.map((entry) => ({ ...entry, isSent: false, isStopped: false, isFound: true, isKept: true })));
  if (found.length) say(`Found again: ${found.length > 1 ? `${found.length} requests` : titleOf(found[0])}`);
  pump();
}

const isOpen = (entry) => entry && !entry.isOver && !entry.lost;

export function titleOf({ body, inputs }) {
  return short(body.positive ?? inputs.image?.[0].name ?? "without a prompt");
}

function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(8));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function pump() {
  for (const request of requests.filter(({ id, isSent }) => !isSent && !isOpen(mine.get(id)))) {
    requests.splice(requests.indexOf(request), 1); // another tab has removed it, or has its end
  }
  if (Date.now() >= heldUntil) {
    for (const request of requests.slice(0, AT_ONCE)) {
      if (!request.isSent) over = Promise.all([over, send(request, over)]);
    }
  }
  showJobs();
}

async function send(request, before) {
  request.isSent = true;
  sent.add(request.id);
  try {
    await request.kept; // before the host has it, so that it is known again whenever this page is left
    if (!request.isAccepted) {
      const turn = handed.then(() => hand(request)); // two at once might arrive in another order
      handed = turn.catch(() => {});
      await turn;
    }
    const record = recordOf(await outcome(request.id), request);
    await before; // two answers may come at the same time
    const entry = await keep(record);
    await note(request.id, { isOver: true, inputs: {} }); // the history has its pictures
    if (follows) {
      show(entry);
      list();
    }
    say(record.count > 1 ? `${record.count} pictures are done.` : "Done.");
  } catch (error) {
    request.isSent = request.isAccepted || request.isStopped || !request.isFound || !isBusy(error);
    if (request.isSent) await tellEnd(request, error);
    else hold(); // its form is gone, so it waits
    if (follows) restore();
  } finally {
    if (request.isSent) requests.splice(requests.indexOf(request), 1);
    pump();
  }
}

function isBusy({ status }) {
  return status === 429 || AWAY.includes(status);
}

// Have the host take a request as a job. It is done once, however often it is asked for with its id.
async function hand(request) {
  const body = { ...request.body };
  for (const [name, pictures] of Object.entries(request.inputs)) {
    const urls = await Promise.all(pictures.map(({ file }) => dataUrl(file)));
    body[name] = urls.length > 1 ? urls : urls[0];
  }
  await post("generate", body, { headers: { "X-Request-Id": request.id, Prefer: "respond-async" } });
  request.isAccepted = true;
  await note(request.id, { isAccepted: true });
  if (request.isStopped) await cancelRequest(request.id);
}

// Say why a request gave no picture, and keep what may be asked for again.
async function tellEnd(request, error) {
  const { id, isAccepted, isFound, isStopped } = request;
  const isGone = isAccepted && error.status === 404;
  const why = sentence(isGone ? "the host no longer has this request" : error.message);
  const isCancelled = error.status === 499 || (isStopped && !isAccepted);
  const isLost = isGone || (isAccepted ? AWAY.includes(error.status) : isFound && !isStopped);
  await note(id, isLost ? { lost: why } : { isOver: true });
  if (isCancelled) return say("Cancelled.");
  say("");
  if (isLost) byId("error").textContent = `${titleOf(request)}: ${why} Send it again?`;
  else if (isFound) byId("error").textContent = `${titleOf(request)}: ${why}`;
  else tellError(error);
  if (!isAccepted && isBusy(error)) hold();
}

// The next request would fail as this one did, so it waits.
function hold() {
  heldUntil = Date.now() + HELD;
  setTimeout(pump, HELD + 10);
}

// Cancelling.

function cancel() {
  if (requests.length) stop(front());
}

async function stop(request) {
  request.isStopped = true;
  if (!request.isSent) {
    requests.splice(requests.indexOf(request), 1);
    say("Removed from the queue.");
    forget(request.id);
  } else if (request.isAccepted) request.isStopped = await cancelRequest(request.id); // else as soon as it is
  showJobs();
}

// Stop a request of this browser, which another tab may have sent.
export function stopMine(id) {
  const request = requests.find((one) => one.id === id);
  return request ? stop(request) : cancelRequest(id);
}

export const isStopped = (id) => requests.some((one) => one.id === id && one.isStopped);
export const isUnsent = (id) => requests.some((one) => one.id === id && !one.isSent);

async function cancelRequest(id) {
  try {
    await call(`cancel?id=${encodeURIComponent(id)}`, { method: "POST" });
    return true;
  } catch (error) {
    tellError(error);
    return false;
  }
}

// What is shown of it.

function showJobs() {
  const { waiting } = jobs;
  const first = front();
  // The answer to a request of this page may come before the news that it is done.
  const running = !first && sent.has(jobs.running?.id) ? null : jobs.running;
  const isMine = first && running?.id === first.id;
  byId("running").hidden = !running && !first;
  byId("peek").hidden = !byId("peek").src || !running || (isMine && follows);
  byId("follow").hidden = follows || !first;
  for (const id of ["cancel", "cancel-here"]) byId(id).disabled = !first || first.isStopped;
  byId("cancel-here").hidden = !first;
  byId("cancel-other").hidden = !running || isMine;
  let doing = "Sent";
  let progress = 0;
  if (first && standing(first.id)) doing = standing(first.id);
  else if (running && (isMine || !first)) {
    const left = waiting.length ? `, ${waiting.length} waiting` : "";
    const which = running.pictures > 1 ? `Picture ${running.picture} of ${running.pictures}, step` : "Step";
    const others = isMine ? "" : "Another request: ";
    doing = `${others}${isMine ? which : which.toLowerCase()} ${running.step} of ${running.steps}${isMine ? "" : left}`;
    progress = running.progress;
  }
  byId("doing").textContent = doing;
  byId("progress").value = progress;
  byId("percent").textContent = `${Math.floor(progress)} %`;
  document.dispatchEvent(new Event("requests"));
}

// Where a request waits at the host, in words; null where it does not.
export function standing(id) {
  const before = jobs.waiting.indexOf(id);
  if (before < 0) return null;
  const others = before + (jobs.running ? 1 : 0);
  return others ? `Queued, ${others} ahead` : "Queued, next";
}

export const handlers = {
  jobs(news) {
    const before = jobs.running?.id;
    jobs = news;
    if (requests.length) beside = jobs.running?.id;
    if (jobs.running?.id !== before) {
      byId("peek").removeAttribute("src");
      if (requests.some(({ id, isFound }) => id === jobs.running?.id && !isFound)) say("Drawing.");
    }
    showJobs();
  },
  preview({ id, jpeg }) {
    const source = `data:image/jpeg;base64,${jpeg}`;
    const first = front();
    if (first ? first.id === id && follows : !shown && !sent.has(id)) {
      showPreview(source, first?.body.width ?? launch.defaults.width);
    } else if (id === jobs.running?.id) {
      byId("peek").src = source;
      byId("peek").hidden = false;
    }
  },
  end({ id, outcome, message }) {
    byId("peek").removeAttribute("src");
    byId("peek").hidden = true;
    if (sent.has(id)) return; // its answer tells more
    if (requests.length || id === beside) return;
    const why = outcome === "failed" ? `: ${message}` : "";
    say(`Another request ${ENDED[outcome]}${why}.`);
    if (!shown) restore();
  },
};

export function openQueue() {
  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  byId("form").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      byId("form").requestSubmit();
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !dialogIsOpen()) cancel();
  });
  for (const id of ["cancel", "cancel-here"]) byId(id).addEventListener("click", cancel);
  byId("cancel-other").addEventListener("click", () => {
    byId("confirm").dataset.id = jobs.running?.id ?? "";
    byId("confirm").returnValue = "no";
    byId("confirm").showModal();
  });
  byId("confirm").addEventListener("close", () => {
    const { id } = byId("confirm").dataset;
    if (byId("confirm").returnValue === "yes" && id) cancelRequest(id);
  });
  document.addEventListener("selected", () => {
    follows = false;
    showJobs();
  });
  byId("follow").addEventListener("click", () => {
    follows = true;
    byId("follow").hidden = true;
  });
  window.addEventListener("beforeunload", (event) => {
    if (requests.some(({ isKept }) => !isKept)) event.preventDefault(); // this browser would not find them again
  });
}
