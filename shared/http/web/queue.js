// This page's requests: sent in their order, followed, cancelled; and what the host tells of all requests.

import { byId, button, dialogIsOpen, element, say, short } from "./dom.js";
import { clearProblems, goTo, readForm, tellError } from "./form.js";
import { keep, list } from "./history.js";
import { HostError, call, dataUrl, fileOf, launch, post } from "./host.js";
import { restore, show, showPreview, shown } from "./stage.js";

const AT_ONCE = 2; // requests at the host: one is drawn, and the next is there when it is done
const HELD = 5000; // milliseconds until the next try where the host takes none
const AWAY = [0, 502, 503]; // statuses of a host that may be starting again
const PATIENCE = 1800000; // milliseconds that one is waited for
const ENDED = { done: "is done", cancelled: "was cancelled", failed: "failed" };

const requests = []; // not yet answered, oldest first: { id, body, inputs, isSent, isStopped, control }
const sent = new Set(); // ids of all requests of this page
let jobs = { running: null, waiting: [] }; // the newest jobs event
let over = Promise.resolve(); // when all requests that were sent are over
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
  requests.push({ id: newId(), body, inputs, isSent: false, isStopped: false, control: new AbortController() });
  if (!before) follows = true;
  say(before ? `Queued: ${titleOf(requests.at(-1))}` : "Sent.");
  byId("stage").scrollIntoView({ block: "nearest" });
  pump();
}

function titleOf({ body, inputs }) {
  return short(body.positive ?? inputs.image?.[0].name ?? "without a prompt");
}

function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(8));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function pump() {
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
    const body = { ...request.body };
    for (const [name, pictures] of Object.entries(request.inputs)) {
      const urls = await Promise.all(pictures.map(({ file }) => dataUrl(file)));
      body[name] = urls.length > 1 ? urls : urls[0];
    }
    const record = recordOf(await answerOf(request, body), request);
    await before; // two answers may come at the same time
    const entry = await keep(record);
    if (follows) {
      show(entry);
      list();
    }
    say(record.count > 1 ? `${record.count} pictures are done.` : "Done.");
  } catch (error) {
    if (error.status === 499 || error.name === "AbortError") say("Cancelled.");
    else {
      say("");
      tellError(error);
      if ([0, 429, 503].includes(error.status)) hold();
    }
    if (follows) restore();
  } finally {
    requests.splice(requests.indexOf(request), 1);
    pump();
  }
}

// A request as a job of the host: a restart of the host in the middle of it is waited out.
async function answerOf({ id, control: { signal } }, body) {
  const headers = { "X-Request-Id": id, Prefer: "respond-async" };
  await post("generate", body, { headers, signal });
  let known = Date.now(); // when the host last told of it
  for (;;) {
    const began = Date.now();
    const job = await call(`jobs/${id}?wait=30`, { signal }).then((response) => response.json(), (error) => {
      if (!AWAY.includes(error.status) || Date.now() - known > PATIENCE) throw error;
      say("The host is away; this request waits for it.");
    });
    if (job?.state === "done") return job.answer;
    if (job?.error) throw new HostError(job.status, job.error.message, job.error.errors);
    if (job) known = Date.now();
    await new Promise((resolve) => setTimeout(resolve, Math.max(0, began + 1000 - Date.now())));
  }
}

// The next request would fail as this one did, so it waits.
function hold() {
  heldUntil = Date.now() + HELD;
  setTimeout(pump, HELD + 10);
}

function recordOf(answer, { id, body, inputs }) {
  const { seed, steps, width, height, seconds, format, warnings = [] } = answer;
  const files = [answer.output].flat().map((data) => fileOf(data, format));
  const seeds = answer.seeds ?? [seed];
  const pictures = seeds.map((one, index) => ({ file: files[index], seed: one }));
  const facts = { steps, width, height, seconds, format, warnings, count: pictures.length };
  return { id, at: Date.now(), type: launch.type, body, inputs, pictures, ...facts };
}

// Cancelling.

function cancel() {
  if (requests.length) stop(front());
}

async function stop(request) {
  request.isStopped = true;
  if (request.isSent) {
    showJobs();
    const answer = await cancelRequest(request.id);
    if (answer?.cancelled === false) request.control.abort(); // it has not arrived yet
    return;
  }
  requests.splice(requests.indexOf(request), 1);
  say("Removed from the queue.");
  showJobs();
}

async function cancelRequest(id) {
  try {
    return await (await call(`cancel?id=${encodeURIComponent(id)}`, { method: "POST" })).json();
  } catch (error) {
    tellError(error);
  }
}

// What is shown of it.

function showJobs() {
  const { waiting } = jobs;
  const mine = front();
  // The answer to a request of this page may come before the news that it is done.
  const running = !mine && sent.has(jobs.running?.id) ? null : jobs.running;
  const ahead = mine ? waiting.indexOf(mine.id) : -1;
  const isMine = mine && running?.id === mine.id;
  byId("running").hidden = !running && !mine;
  byId("peek").hidden = !byId("peek").src || !running || (isMine && follows);
  byId("follow").hidden = follows || !mine;
  for (const id of ["cancel", "cancel-here"]) byId(id).disabled = !mine || mine.isStopped;
  byId("cancel-here").hidden = !mine;
  byId("cancel-other").hidden = !running || isMine;
  let doing = "Sent";
  let progress = 0;
  if (ahead >= 0) {
    const others = ahead + (running ? 1 : 0);
    doing = others ? `Queued, ${others} ahead` : "Queued, next";
  } else if (running && (isMine || !mine)) {
    const left = waiting.length ? `, ${waiting.length} waiting` : "";
    const which = running.pictures > 1 ? `Picture ${running.picture} of ${running.pictures}, step` : "Step";
    const others = isMine ? "" : "Another request: ";
    doing = `${others}${isMine ? which : which.toLowerCase()} ${running.step} of ${running.steps}${isMine ? "" : left}`;
    progress = running.progress;
  }
  byId("doing").textContent = doing;
  byId("progress").value = progress;
  byId("percent").textContent = `${Math.floor(progress)} %`;
  showQueue(requests.filter((request) => request !== mine));
}

function showQueue(waiting) {
  byId("queue-title").hidden = !waiting.length;
  const items = waiting.map((request) => {
    const text = titleOf(request);
    const remove = button("Remove", () => stop(request), { disabled: request.isStopped });
    remove.setAttribute("aria-label", `Remove from the queue: ${text}`);
    return element("li", { class: "row" }, element("span", {}, text), remove);
  });
  const at = [...byId("queue").children].findIndex((item) => item.contains(document.activeElement));
  byId("queue").replaceChildren(...items);
  if (at >= 0) byId("queue").children[Math.min(at, items.length - 1)]?.querySelector("button").focus();
}

export const handlers = {
  jobs(news) {
    const before = jobs.running?.id;
    jobs = news;
    if (requests.length) beside = jobs.running?.id;
    if (jobs.running?.id !== before) {
      byId("peek").removeAttribute("src");
      if (requests.some(({ id }) => id === jobs.running?.id)) say("Drawing.");
    }
    showJobs();
  },
  preview({ id, jpeg }) {
    const source = `data:image/jpeg;base64,${jpeg}`;
    const mine = front();
    if (mine ? mine.id === id && follows : !shown && !sent.has(id)) {
      showPreview(source, mine?.body.width ?? launch.defaults.width);
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
    if (requests.length) event.preventDefault(); // they would be cancelled
  });
}
