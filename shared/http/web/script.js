// The page of a host: a form made from GET /launch, POST /generate, and what GET /events tells.

const byId = (id) => document.getElementById(id);
const KEPT = 100; // pictures in the history
const RETRY = { first: 1000, most: 10000 }; // milliseconds until the stream is opened again
const ENDED = { done: "is done", cancelled: "was cancelled", failed: "failed" };

// The fields that are shown at once, in this order; all others that have a label stand under "more".
const FIRST = [
  ...["positive", "negative", "image", "control_image", "ip_image", "width", "height", "frames", "fps"],
  ...["steps", "cfg", "seed", "pictures"],
];
const EMPTY = { seed: "drawn", scheduler: "default" }; // what a field that is left empty means
const KINDS = ["text", "image", "number", "choice"]; // that the form has controls for
// The page asks for one picture at a time, so it may ask for more of them than one request.
const PICTURES = { label: "Pictures", kind: "number", minimum: 1, maximum: 64, step: 1 };

let launch = null; // GET /launch
let controls = []; // [request field, what the launch tells of it], in the form's order
let jobs = { running: null, waiting: [] }; // the newest jobs event
let mine = null; // { id, stopped, body } of the request that this page waits for
let shownEntry = null;
let lastWords = ""; // why the host said that it ends
let stream = null; // AbortController of the open stream
const images = {}; // request field -> { url: data URI, name }
const entries = []; // the history, newest first
const sent = new Set(); // ids of all requests of this page

// Talking to the host.

class HostError extends Error {
  constructor(status, message, errors = []) {
    super(message);
    this.status = status;
    this.errors = errors;
  }
}

async function call(path, options = {}) {
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
  throw new HostError(response.status, answer.message || fallback, answer.errors);
}

function lock(problem) {
  stream?.abort();
  byId("main").hidden = true;
  byId("unlock").hidden = false;
  byId("token-problem").textContent = problem;
  setState("locked", "");
  byId("token").focus();
}

byId("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", byId("token").value.trim());
  start();
});

async function start() {
  try {
    launch = await (await call("launch")).json();
  } catch (error) {
    if (error.status === 401) return;
    setState("unreachable", error.message);
    setTimeout(start, 3000);
    return;
  }
  byId("unlock").hidden = true;
  byId("main").hidden = false;
  byId("title").textContent = `${launch.title} on ${launch.backend}`;
  if (!byId("fields").children.length) buildForm();
  watch();
}

// The form.

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

function buildForm() {
  const told = { ...launch.fields, pictures: PICTURES };
  const more = Object.keys(told).filter((name) => !FIRST.includes(name));
  controls = [...FIRST, ...more]
    .filter((name) => told[name] && told[name].label && KINDS.includes(told[name].kind))
    .map((name) => [name, told[name]]);
  for (const [name, options] of controls) {
    const control = makeControl(name, options);
    const notes = [options.unit, launch.needs.includes(name) && "needed"].filter(Boolean).join(", ");
    const wide = options.kind === "text" || options.kind === "image";
    const field = element("div", { class: wide ? "field wide" : "field" });
    field.append(
      element("label", { for: name }, options.label + " ", notes && element("small", {}, notes)),
      control,
      ...(options.kind === "image" ? [element("div", { id: `${name}-chosen`, class: "chosen", hidden: true })] : []),
      element("p", { id: `${name}-problem`, class: "problem" }),
    );
    control.setAttribute("aria-describedby", `${name}-problem`);
    byId(FIRST.includes(name) ? "fields" : "more-fields").append(field);
  }
  if (byId("pictures")) byId("pictures").value = 1;
}

function makeControl(name, { kind, choices, minimum, maximum, step }) {
  const given = launch.defaults[name];
  if (kind === "text") return element("textarea", { id: name, rows: name === "positive" ? 4 : 2 });
  if (kind === "image") {
    const control = element("input", { id: name, type: "file", accept: "image/png,image/jpeg,image/webp,image/bmp" });
    control.addEventListener("change", () => chooseFile(name, control.files[0]));
    return control;
  }
  if (kind === "choice") {
    const control = element("select", { id: name });
    if (EMPTY[name]) control.append(element("option", { value: "" }, EMPTY[name]));
    for (const choice of choices) control.append(element("option", { value: choice }, choice));
    return control;
  }
  // An input counts its steps from its least value, which must then be a number that JavaScript has.
  const exact = (bound) => (Number.isInteger(bound) && !Number.isSafeInteger(bound) ? undefined : bound);
  const bounds = { min: exact(minimum), max: exact(maximum), step: step ?? "any", placeholder: EMPTY[name] };
  const control = element("input", { id: name, type: "number", inputmode: "decimal", ...bounds });
  if (given !== undefined) control.value = given;
  return control;
}

function chooseFile(name, file) {
  if (!file) return;
  const reader = new FileReader();
  reader.onload = () => setImage(name, { url: reader.result, name: file.name });
  reader.onerror = () => problemAt(name, `${file.name} cannot be read`);
  reader.readAsDataURL(file);
}

function setImage(name, image) {
  const chosen = byId(`${name}-chosen`);
  chosen.replaceChildren();
  chosen.hidden = !image;
  if (!image) {
    delete images[name];
    byId(name).value = "";
    return;
  }
  images[name] = image;
  const remove = element("button", { type: "button" }, "Remove");
  remove.addEventListener("click", () => {
    setImage(name, null);
    byId(name).focus();
  });
  chosen.append(element("img", { src: image.url, alt: "" }), element("span", {}, image.name), remove);
}

// What the form says: the body of POST /generate without its pictures' number, and that number.
function readForm() {
  const body = {};
  let wrong = null;
  for (const [name, { kind }] of controls) {
    const control = byId(name);
    if (!control) continue;
    if (kind === "image") {
      if (images[name]) body[name] = images[name].url;
    } else if (kind === "number") {
      const value = control.valueAsNumber;
      const unsafe = Number.isInteger(value) && !Number.isSafeInteger(value);
      if (control.validity.badInput || unsafe) {
        problemAt(name, unsafe ? "is too large for this page" : "must be a number");
        wrong ??= control;
      } else if (!Number.isNaN(value)) body[name] = value;
    } else if (control.value.trim()) body[name] = control.value;
  }
  const pictures = body.pictures ?? 1;
  delete body.pictures;
  if (!(Number.isInteger(pictures) && pictures >= 1 && pictures <= PICTURES.maximum)) {
    problemAt("pictures", `must be 1 to ${PICTURES.maximum}`);
    wrong ??= byId("pictures");
  }
  return { body, pictures, wrong };
}

function fillForm(body, names) {
  for (const [name, { kind }] of controls) {
    const control = byId(name);
    if (!control || name === "pictures") continue;
    if (kind === "image") setImage(name, body[name] ? { url: body[name], name: names[name] } : null);
    else control.value = body[name] ?? "";
  }
}

function problemAt(name, problem) {
  byId(`${name}-problem`).textContent = problem;
  byId(name).setAttribute("aria-invalid", "true");
}

function clearProblems() {
  byId("error").textContent = "";
  for (const control of document.querySelectorAll("[aria-invalid]")) {
    control.removeAttribute("aria-invalid");
    byId(`${control.id}-problem`).textContent = "";
  }
}

function tellError(error) {
  const elsewhere = [];
  let first = null;
  for (const { field, problem } of error.errors ?? []) {
    const name = field.split(".")[0];
    if (byId(`${name}-problem`)) {
      problemAt(name, problem);
      first ??= byId(name);
    } else elsewhere.push(field ? `${field}: ${problem}` : problem);
  }
  if (first) {
    first.closest("details")?.setAttribute("open", "");
    first.focus();
    elsewhere.unshift("The host refuses these settings: see the marked fields.");
  }
  byId("error").textContent = elsewhere.join(" ") || error.message;
}

// Making pictures.

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!mine) make();
});

byId("form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    byId("form").requestSubmit();
  }
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && mine && !byId("confirm").open) cancel();
});

for (const id of ["cancel", "cancel-here"]) byId(id).addEventListener("click", cancel);

byId("cancel-other").addEventListener("click", () => {
  byId("confirm").dataset.id = jobs.running?.id ?? "";
  byId("confirm").returnValue = "no";
  byId("confirm").showModal();
});

byId("confirm").addEventListener("close", () => {
  if (byId("confirm").returnValue === "yes") cancelRequest(byId("confirm").dataset.id);
});

async function make() {
  clearProblems();
  const { body, pictures, wrong } = readForm();
  if (wrong) {
    wrong.closest("details")?.setAttribute("open", "");
    wrong.focus();
    return;
  }
  const names = Object.fromEntries(Object.entries(images).map(([name, image]) => [name, image.name]));
  const series = { id: "", stopped: false, body };
  mine = series;
  byId("generate").disabled = true;
  byId("stage").scrollIntoView({ block: "nearest" });
  try {
    for (let index = 0; index < pictures && !series.stopped; index++) {
      series.id = requestId();
      sent.add(series.id);
      series.body = body.seed === undefined ? body : { ...body, seed: body.seed + index };
      say(pictures > 1 ? `Sent picture ${index + 1} of ${pictures}.` : "Sent.");
      showJobs();
      const headers = { "Content-Type": "application/json", "X-Request-Id": series.id };
      const request = { method: "POST", headers, body: JSON.stringify(series.body) };
      keep(await (await call("generate", request)).json(), series.body, names);
      say(pictures > 1 ? `Picture ${index + 1} of ${pictures} is done.` : "Done.");
    }
  } catch (error) {
    if (error.status === 499) say("Cancelled.");
    else {
      say("");
      tellError(error);
    }
    if (shownEntry) show(shownEntry);
    else clearStage();
  } finally {
    mine = null;
    byId("generate").disabled = false;
    showJobs();
  }
}

function requestId() {
  const bytes = crypto.getRandomValues(new Uint8Array(8));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function cancel() {
  if (!mine) return;
  mine.stopped = true;
  showJobs();
  cancelRequest(mine.id);
}

async function cancelRequest(id) {
  if (!id) return;
  try {
    await call(`cancel?id=${encodeURIComponent(id)}`, { method: "POST" });
  } catch (error) {
    tellError(error);
  }
}

// What is shown.

function say(text) {
  byId("status").textContent = text;
}

function keep(answer, body, names) {
  const files = [answer.output].flat().map((data) => new Blob([bytesOf(data)], { type: mimeType(answer.format) }));
  const { seed, steps, width, height, seconds, format, warnings = [] } = answer;
  const urls = files.map((file) => URL.createObjectURL(file));
  const entry = { url: urls[0], format, seed, steps, width, height, seconds, warnings, names, body: { ...body, seed } };
  entries.unshift(entry);
  for (const old of entries.splice(KEPT)) URL.revokeObjectURL(old.url);
  show(entry);
}

function bytesOf(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

function mimeType(format) {
  return format === "mp4" ? "video/mp4" : `image/${format}`;
}

function media(entry, attributes) {
  if (entry.format !== "mp4") return element("img", { src: entry.url, ...attributes });
  const video = element("video", { src: entry.url, "aria-label": attributes.alt, loop: true, playsinline: true });
  video.muted = true;
  return video;
}

function show(entry) {
  shownEntry = entry;
  const picture = media(entry, { alt: entry.body.positive ?? "The picture" });
  if (entry.format === "mp4") {
    picture.controls = true;
    picture.autoplay = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  }
  stage(picture, entry.width);
  const { total, denoise } = entry.seconds;
  const times = `${total.toFixed(2)} s, of which ${denoise.toFixed(2)} s denoising`;
  byId("facts").textContent = `Seed ${entry.seed} · ${entry.width} × ${entry.height} · ${entry.steps} steps · ${times}`;
  byId("warnings").replaceChildren(...entry.warnings.map((text) => element("li", {}, text)));
  byId("warnings").hidden = !entry.warnings.length;
  byId("download").href = entry.url;
  byId("download").download = `${launch.type}-${entry.seed}.${entry.format}`;
  byId("result").hidden = false;
  showHistory();
}

function stage(picture, width) {
  byId("empty").hidden = true;
  byId("shown").hidden = false;
  byId("shown").replaceChildren(picture);
  picture.style.maxWidth = `${Math.max(width ?? 0, 384)}px`; // a preview takes the place of its picture
}

function clearStage() {
  byId("empty").hidden = false;
  byId("shown").hidden = true;
  byId("shown").replaceChildren();
}

function showHistory() {
  byId("history-card").hidden = !entries.length;
  const items = entries.map((entry) => {
    const about = `Seed ${entry.seed}`;
    const picture = media(entry, { alt: "", loading: "lazy" });
    const button = element("button", { type: "button", title: entry.body.positive }, picture, about);
    if (entry === shownEntry) button.setAttribute("aria-current", "true");
    button.addEventListener("click", () => {
      const place = entries.indexOf(entry);
      show(entry);
      byId("history").children[place].firstChild.focus();
    });
    return element("li", {}, button);
  });
  byId("history").replaceChildren(...items);
}

byId("reuse").addEventListener("click", () => {
  fillForm(shownEntry.body, shownEntry.names);
  say(`The form has the settings of seed ${shownEntry.seed}.`);
  document.querySelector("#fields textarea, #fields input").focus();
});

function showJobs() {
  const { waiting } = jobs;
  // The answer to a request of this page may come before the news that it is done.
  const running = !mine && sent.has(jobs.running?.id) ? null : jobs.running;
  const ahead = mine ? waiting.indexOf(mine.id) : -1;
  const isMine = mine && running?.id === mine.id;
  byId("running").hidden = !running && !mine;
  byId("peek").hidden = isMine || !running || !byId("peek").src;
  for (const id of ["cancel", "cancel-here"]) byId(id).disabled = !mine || mine.stopped;
  byId("cancel-here").hidden = !mine;
  byId("cancel-other").hidden = !running || isMine;
  let doing = "Sent";
  let progress = 0;
  if (ahead >= 0) {
    const others = ahead + (running ? 1 : 0);
    doing = others ? `Queued, ${others} ahead` : "Queued, next";
  } else if (running && (isMine || !mine)) {
    const left = waiting.length ? `, ${waiting.length} waiting` : "";
    doing = `${isMine ? "Step" : "Another request: step"} ${running.step} of ${running.steps}${isMine ? "" : left}`;
    progress = running.progress;
  }
  byId("doing").textContent = doing;
  byId("progress").value = progress;
  byId("percent").textContent = `${Math.floor(progress)} %`;
}

function showPreview({ id, jpeg }) {
  const source = `data:image/jpeg;base64,${jpeg}`;
  if (mine ? mine.id === id : !shownEntry && !sent.has(id)) {
    const width = mine?.body.width ?? launch.defaults.width;
    stage(element("img", { class: "preview", src: source, alt: "The picture so far" }), width);
    byId("result").hidden = true;
  } else if (id === jobs.running?.id) {
    byId("peek").src = source;
    byId("peek").hidden = false;
  }
}

function showEnd({ id, outcome, message }) {
  byId("peek").removeAttribute("src");
  byId("peek").hidden = true;
  if (sent.has(id)) return; // its answer tells more
  const why = outcome === "failed" ? `: ${message}` : "";
  if (!mine) say(`Another request ${ENDED[outcome]}${why}.`);
  if (!mine && !shownEntry) clearStage();
}

function setState(state, message) {
  byId("state").textContent = state;
  byId("state").dataset.state = state;
  byId("host-message").textContent = message;
}

function showHost(host) {
  setState(host.state, host.message);
  lastWords = ["broken", "stopping"].includes(host.state) && host.message ? ` It said: ${host.message}.` : "";
  const { stages = [], ranks: parts = [], ...settings } = host.plan;
  const facts = Object.entries(settings).filter(([, value]) => value !== null && value !== "");
  const pairs = facts.map(([name, value]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, inWords(value))),
  );
  byId("plan").replaceChildren(...pairs);
  byId("stages").hidden = !stages.length;
  byId("stages").replaceChildren(...stages.map(stageItem));
  const rows = host.ranks.map((rank) => {
    const { memory_used_mib: used, memory_total_mib: total } = rank;
    const memory = used === undefined ? "" : `${gib(used)}${total ? ` of ${gib(total)}` : ""} GiB`;
    const device = rank.name ? `${rank.device} (${rank.name})` : rank.device;
    const cells = [parts[rank.rank] ?? "whole model", host.state, device, memory];
    const head = element("th", { scope: "row" }, String(rank.rank));
    return element("tr", {}, head, ...cells.map((text) => element("td", {}, inWords(text))));
  });
  byId("ranks").tBodies[0].replaceChildren(...rows);
  byId("ranks").hidden = !rows.length;
  byId("versions").textContent = Object.entries(host.versions).map((pair) => pair.join(" ")).join(" · ");
}

function stageItem(part, number) {
  const share = `${(100 * part.share).toFixed(1)} %`;
  const runs = part.runs.map(([first, last]) => (first === last ? first : `${first} … ${last}`)).join(", ");
  return element(
    "li",
    {},
    `Stage ${number}: ${share} of the arithmetic`,
    element("meter", { value: part.share, "aria-label": `share of stage ${number}` }, share),
    element("small", { class: "hint" }, runs),
  );
}

function gib(mib) {
  return (mib / 1024).toFixed(1);
}

function inWords(value) {
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (Array.isArray(value)) return value.map(inWords).join(", ");
  if (typeof value === "number") return value.toLocaleString("en");
  if (typeof value !== "object" || value === null) return String(value);
  return Object.entries(value).map(([name, part]) => `${name} ${inWords(part)}`).join(", ");
}

// The stream. A header carries the token, so it is read by fetch; EventSource can send none.

const HANDLERS = {
  host: showHost,
  jobs: (news) => {
    const before = jobs.running?.id;
    jobs = news;
    if (jobs.running?.id !== before) {
      byId("peek").removeAttribute("src");
      if (mine && jobs.running?.id === mine.id) say("Drawing.");
    }
    showJobs();
  },
  preview: showPreview,
  end: showEnd,
  beat: () => {},
};

async function watch() {
  stream?.abort();
  const control = new AbortController();
  stream = control;
  let wait = RETRY.first;
  while (!control.signal.aborted) {
    try {
      const response = await call("events", { signal: control.signal });
      if (wait > RETRY.first) await checkLaunch();
      wait = RETRY.first;
      await readEvents(response.body.getReader());
      setState("unreachable", `The host has ended the connection.${lastWords}`);
    } catch (error) {
      if (control.signal.aborted) return;
      const taken = error.status === 503;
      if (taken) setState("not live", `No live view: ${error.message}.`);
      else setState("unreachable", error.message + lastWords);
    }
    jobs = { running: null, waiting: [] };
    showJobs();
    await new Promise((resolve) => setTimeout(resolve, wait));
    wait = Math.min(2 * wait, RETRY.most);
  }
}

async function checkLaunch() {
  const now = await (await call("launch")).json();
  if (JSON.stringify(now) !== JSON.stringify(launch)) {
    byId("error").textContent = "The host was started again with other settings: reload this page.";
  }
}

async function readEvents(reader) {
  const decoder = new TextDecoder();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += decoder.decode(value, { stream: true });
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      const [, name, data] = event.match(/^event: (\w+)\ndata: (.*)$/) ?? [];
      HANDLERS[name]?.(JSON.parse(data));
    }
  }
}

// A browser opens only a few connections to one host, so tabs that nobody sees leave theirs to the others.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) stream?.abort();
  else if (launch && byId("unlock").hidden) watch();
});

start();
