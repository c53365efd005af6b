// What came of an accepted request: waited for, and as a record of the history.

import { say } from "./dom.js";
import { HostError, call, fileOf, launch } from "./host.js";

export const AWAY = [0, 502, 503]; // statuses of a host that may be starting again
const PATIENCE = 1800000; // milliseconds that one is waited for

// The answer; a restart of the host in the middle of it is waited out.
export async function outcome(id) {
  let known = Date.now(); // when the host last told of it
  for (;;) {
    const began = Date.now();
    const job = await call(`jobs/${id}?wait=30`).then((response) => response.json(), (error) => {
      if (!AWAY.includes(error.status) || Date.now() - known > PATIENCE) throw error;
      say("The host is away; this request waits for it.");
    });
    if (job?.state === "done") return job.answer;
    if (job?.error) throw new HostError(job.status, job.error.message, job.error.errors);
    if (job) known = Date.now();
    await new Promise((resolve) => setTimeout(resolve, Math.max(0, began + 1000 - Date.now())));
  }
}

export function recordOf(answer, { id, body, inputs }) {
  const { seed, steps, width, height, seconds, format, warnings = [] } = answer;
  const files = [answer.output].flat().map((data) => fileOf(data, format));
  const seeds = answer.seeds ?? [seed];
  const pictures = seeds.map((one, index) => ({ file: files[index], seed: one }));
  const facts = { steps, width, height, seconds, format, warnings, count: pictures.length };
  return { id, at: Date.now(), type: launch.type, body, inputs, pictures, ...facts };
}
