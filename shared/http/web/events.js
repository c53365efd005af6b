// The stream of GET /events. A header carries the token, so it is read by fetch; EventSource can send none.

import { byId } from "./dom.js";
import { call, get, launch, setState } from "./host.js";

const RETRY = { first: 1000, most: 10000 }; // milliseconds until the stream is opened again

let stream = null; // AbortController of the open stream
let lastWords = ""; // why the host said that it ends

export async function watch(handlers) {
  stream?.abort();
  const control = new AbortController();
  stream = control;
  let wait = RETRY.first;
  while (!control.signal.aborted) {
    try {
      const response = await call("events", { signal: control.signal });
      if (wait > RETRY.first) await checkLaunch();
      wait = RETRY.first;
      handlers.open();
      await read(response.body.getReader(), handlers);
      setState("unreachable", `The host has ended the connection.${lastWords}`);
    } catch (error) {
      if (control.signal.aborted) return;
      const taken = error.status === 503;
      if (taken) setState("not live", `No live view: ${error.message}.`);
      else setState("unreachable", error.message + lastWords);
    }
    handlers.jobs({ running: null, waiting: [] });
    await new Promise((resolve) => setTimeout(resolve, wait));
    wait = Math.min(2 * wait, RETRY.most);
  }
}

async function checkLaunch() {
  if (JSON.stringify(await get("launch")) !== JSON.stringify(launch)) {
    byId("error").textContent = "The host was started again with other settings: reload this page.";
  }
}

async function read(reader, handlers) {
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
      const news = name && JSON.parse(data);
      if (name === "host") {
        const ends = ["broken", "stopping"].includes(news.state) && news.message;
        lastWords = ends ? ` It said: ${news.message}.` : "";
      }
      handlers[name]?.(news);
    }
  }
}

export function stopWatching() {
  stream?.abort();
}
