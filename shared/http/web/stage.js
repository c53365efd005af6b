// The stage: the picture that forms or is shown, what is known of it, and its start beside it.

import { byId, element } from "./dom.js";
import { launch } from "./host.js";

export let shown = null; // the entry of the history that is shown

export function show(entry) {
  shown = entry;
  const { record } = entry;
  const picture = media(entry, { alt: record.body.positive ?? "The picture" });
  if (record.format === "mp4") {
    picture.controls = true;
    picture.autoplay = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  }
  put(picture, record.width);
  showBefore(entry, picture);
  const { total, denoise } = record.seconds;
  const all = record.count > 1 ? ` for ${record.count} pictures` : "";
  const times = `${total.toFixed(2)} s${all}, of which ${denoise.toFixed(2)} s denoising`;
  const size = `${record.width} × ${record.height}`;
  byId("facts").textContent = `Seed ${entry.seed} · ${size} · ${record.steps} steps · ${times}`;
  byId("warnings").replaceChildren(...record.warnings.map((text) => element("li", {}, text)));
  byId("warnings").hidden = !record.warnings.length;
  byId("download").href = entry.url;
  byId("download").download = `${record.type}-${entry.seed}.${record.format}`;
  byId("start-from").hidden = !launch.fields.image || record.format === "mp4";
  byId("result").hidden = false;
}

export function media(entry, attributes) {
  if (entry.record.format !== "mp4") return element("img", { src: entry.url, ...attributes });
  const video = element("video", { src: entry.url, "aria-label": attributes.alt, loop: true, playsinline: true });
  video.muted = true;
  return video;
}

export function showPreview(source, width) {
  put(element("img", { class: "preview", src: source, alt: "The picture so far" }), width);
  byId("compare-row").hidden = true;
  byId("result").hidden = true;
}

function put(picture, width) {
  byId("empty").hidden = true;
  byId("shown").hidden = false;
  byId("shown").replaceChildren(picture);
  picture.style.maxWidth = `${Math.max(width ?? 0, 384)}px`; // a preview takes the place of its picture
}

// What is shown when a request ends without a picture.
export function restore() {
  if (shown) return show(shown);
  byId("empty").hidden = false;
  byId("shown").hidden = true;
  byId("shown").replaceChildren();
}

export function forget() {
  shown = null;
  byId("result").hidden = true;
  byId("compare-row").hidden = true;
  restore();
}

// The input picture lies over the result, cut off where the slider stands: at 0 only the result is seen.
function showBefore(entry, picture) {
  const before = entry.record.inputs.image?.[0];
  byId("compare-row").hidden = !before || entry.record.format === "mp4";
  if (byId("compare-row").hidden) return;
  const url = URL.createObjectURL(before.file);
  const over = element("img", { src: url, class: "before", alt: "The input picture" });
  over.addEventListener("load", () => URL.revokeObjectURL(url), { once: true });
  const pair = element("div", { class: "pair" }, over);
  pair.style.maxWidth = picture.style.maxWidth;
  picture.replaceWith(pair);
  pair.prepend(picture);
  byId("compare").value = 0;
  cut();
}

function cut() {
  byId("shown").style.setProperty("--cut", `${byId("compare").value}%`);
}

byId("compare").addEventListener("input", cut);
