// What the host is made of: its plan, its stages and its ranks.

import { byId, element } from "./dom.js";
import { setState } from "./host.js";

export function showHost(host) {
  setState(host.state, host.message);
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
  const count = rows.length === 1 ? "1 rank" : `${rows.length} ranks`;
  byId("host-summary").textContent = [host.plan.method, rows.length && count].filter(Boolean).join(", ");
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
