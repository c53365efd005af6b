// The page of a host: a form made from GET /launch, POST /generate, and what GET /events tells.

import { byId } from "./dom.js";
import { stopWatching, watch } from "./events.js";
import { buildForm } from "./form.js";
import { openFull } from "./full.js";
import { openHistory } from "./history.js";
import { get, launch, setState } from "./host.js";
import { openJobs, refreshJobs } from "./jobs.js";
import { buildLoras } from "./loras.js";
import { showHost } from "./machine.js";
import { addPainter } from "./mask.js";
import { takeDrops } from "./pictures.js";
import { findAgain, handlers, openQueue } from "./queue.js";
import { openSettings, readPicture } from "./settings.js";

const HANDLERS = {
  ...handlers,
  host: showHost,
  open: refreshJobs,
  end(news) {
    handlers.end(news);
    refreshJobs();
  },
};

async function start() {
  try {
    Object.assign(launch, await get("launch"));
  } catch (error) {
    if (error.status === 401) return;
    setState("unreachable", error.message);
    setTimeout(start, 3000);
    return;
  }
  byId("unlock").hidden = true;
  byId("main").hidden = false;
  byId("title").textContent = `${launch.title} on ${launch.backend}`;
  if (!byId("fields").children.length) build();
  watch(HANDLERS);
}

function build() {
  buildForm();
  addPainter();
  buildLoras();
  openQueue();
  openSettings();
  openFull();
  openJobs();
  openHistory().then(findAgain);
  takeDrops(readPicture);
}

byId("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", byId("token").value.trim());
  start();
});

document.addEventListener("locked", stopWatching);

// A browser opens only a few connections to one host, so tabs that nobody sees leave theirs to the others.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) stopWatching();
  else if (launch.fields && byId("unlock").hidden) watch(HANDLERS);
});

start();
