// The painter: a mask over the input picture, by mouse, pen, finger or keyboard.
//
// What was done is a list of strokes, so that the last of them can be undone; the canvas is drawn from it.

import { byId, button } from "./dom.js";
import { picked, setPictures } from "./pictures.js";

const PAINT = "#e6007e"; // seen on most pictures; the mask that goes out is white on black
const MOST_PIXELS = 16e6; // of a canvas in some browsers
const UNDO = "undo";

let picture = null; // that is painted over
let base = null; // canvas of the mask that was there before
let deeds = []; // { kind: "stroke", erase, size, points } | { kind: "invert" } | { kind: "clear" }
let open = null; // the stroke that is being drawn
let spot = null; // where the keyboard's brush is; [x, y]
let penDown = false;

const canvas = () => byId("mask-canvas");
const context = () => canvas().getContext("2d");

export function addPainter() {
  const field = byId("mask")?.closest(".field");
  if (!field) return;
  field.querySelector(".drop").prepend(button("Paint", openPainter, { id: "paint" }));
  document.addEventListener("picture", ({ detail }) => {
    if (detail.name === "mask" && detail.pictures.length) {
      byId("mask-chosen").firstChild.lastChild.before(button("Edit", openPainter, { id: "paint-on" }));
    }
    if (detail.name === "image" && detail.byHand) dropMask(detail.pictures[0]);
  });
  for (const [id, kind] of [["mask-invert", "invert"], ["mask-clear", "clear"], ["mask-undo", UNDO]]) {
    byId(id).addEventListener("click", () => act(kind));
  }
  byId("mask-size").addEventListener("input", showBrush);
  byId("painter").addEventListener("close", finish);
  byId("painter").addEventListener("keydown", onKey);
  canvas().addEventListener("pointerdown", onDown);
  canvas().addEventListener("pointermove", onMove);
  canvas().addEventListener("pointerup", onUp);
  canvas().addEventListener("pointercancel", () => {
    if (open) deeds.pop(); // the second finger of a pinch has come
    open = null;
    redraw();
  });
  canvas().addEventListener("pointerleave", () => {
    byId("mask-ring").hidden = !spot;
  });
}

// A mask belongs to the size of its picture.
function dropMask(now) {
  const mask = picked("mask")[0];
  if (!mask || (now && mask.width === now.width && mask.height === now.height)) return;
  setPictures("mask", []);
  if (now) byId("mask-problem").textContent = "was removed: it was painted on a picture of another size";
}

async function openPainter() {
  [picture] = picked("image");
  const scale = Math.min(1, Math.sqrt(MOST_PIXELS / (picture.width * picture.height)));
  canvas().width = Math.round(picture.width * scale);
  canvas().height = Math.round(picture.height * scale);
  byId("mask-under").src = picture.url;
  byId("mask-frame").style.aspectRatio = `${picture.width} / ${picture.height}`;
  byId("mask-frame").style.setProperty("--shape", picture.width / picture.height);
  const longest = Math.max(canvas().width, canvas().height);
  byId("mask-size").max = Math.ceil(longest / 2);
  byId("mask-size").value = Math.max(1, Math.round(longest / 12));
  byId("mask-paint").checked = true;
  deeds = [];
  [spot, penDown, open] = [null, false, null];
  base = picked("mask").length ? await layer(picked("mask")[0]) : null;
  byId("painter").returnValue = "";
  byId("painter").showModal();
  canvas().focus();
  redraw();
  showBrush();
}

// A mask picture as paint: as much of it as the picture is bright and opaque.
async function layer(mask) {
  const image = new Image();
  image.src = mask.url;
  await image.decode();
  const made = document.createElement("canvas");
  [made.width, made.height] = [canvas().width, canvas().height];
  const drawing = made.getContext("2d");
  drawing.drawImage(image, 0, 0, made.width, made.height);
  const pixels = drawing.getImageData(0, 0, made.width, made.height);
  for (let at = 0; at < pixels.data.length; at += 4) {
    const light = 0.299 * pixels.data[at] + 0.587 * pixels.data[at + 1] + 0.114 * pixels.data[at + 2];
    pixels.data[at + 3] = (light * pixels.data[at + 3]) / 255;
  }
  drawing.putImageData(pixels, 0, 0);
  tint(drawing, PAINT);
  return made;
}

function tint(drawing, colour) {
  drawing.globalCompositeOperation = "source-in";
  drawing.fillStyle = colour;
  drawing.fillRect(0, 0, drawing.canvas.width, drawing.canvas.height);
  drawing.globalCompositeOperation = "source-over";
}

function act(kind) {
  if (kind === UNDO) deeds.pop();
  else deeds.push({ kind });
  open = null;
  redraw();
}

function redraw() {
  const drawing = context();
  const { width, height } = canvas();
  drawing.globalCompositeOperation = "source-over";
  drawing.clearRect(0, 0, width, height);
  if (base) drawing.drawImage(base, 0, 0);
  for (const deed of deeds) {
    if (deed.kind === "clear") drawing.clearRect(0, 0, width, height);
    else if (deed.kind === "invert") {
      drawing.globalCompositeOperation = "source-out";
      drawing.fillStyle = PAINT;
      drawing.fillRect(0, 0, width, height);
    } else drawStroke(deed);
  }
  byId("mask-undo").disabled = !deeds.length;
}

function drawStroke({ erase, size, points }, from = 0) {
  const drawing = context();
  drawing.globalCompositeOperation = erase ? "destination-out" : "source-over";
  drawing.lineCap = drawing.lineJoin = "round";
  drawing.lineWidth = size;
  drawing.strokeStyle = PAINT;
  drawing.beginPath();
  drawing.moveTo(...points[from]);
  for (const point of points.slice(from)) drawing.lineTo(...point);
  drawing.stroke();
}

function place(event) {
  const { left, top, width, height } = canvas().getBoundingClientRect();
  return [((event.clientX - left) * canvas().width) / width, ((event.clientY - top) * canvas().height) / height];
}

function begin(point) {
  open = { kind: "stroke", erase: byId("mask-erase").checked, size: byId("mask-size").valueAsNumber, points: [point] };
  deeds.push(open);
  drawStroke(open);
  byId("mask-undo").disabled = false;
}

function extend(points) {
  const from = open.points.length - 1;
  open.points.push(...points);
  drawStroke(open, from);
}

function onDown(event) {
  if (!event.isPrimary || event.button) return;
  event.preventDefault();
  canvas().focus();
  canvas().setPointerCapture(event.pointerId);
  spot = null;
  penDown = false;
  begin(place(event));
}

function onMove(event) {
  if (!event.isPrimary) return;
  showRing(place(event));
  if (!open || penDown) return;
  const events = event.getCoalescedEvents?.() ?? [];
  extend((events.length ? events : [event]).map(place));
}

function onUp(event) {
  if (event.isPrimary && !penDown) open = null;
}

const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function onKey(event) {
  if ((event.ctrlKey || event.metaKey) && event.key === "z") act(UNDO);
  else if (event.key === "[" || event.key === "]") {
    const size = byId("mask-size");
    size.valueAsNumber = size.valueAsNumber * (event.key === "]" ? 1.25 : 0.8) + (event.key === "]" ? 1 : 0);
    showBrush();
  } else if (event.target === canvas() && (MOVES[event.key] || event.key === " ")) {
    spot ??= [canvas().width / 2, canvas().height / 2];
    if (MOVES[event.key]) moveSpot(MOVES[event.key], event.shiftKey ? 1 : byId("mask-size").valueAsNumber / 2);
    else {
      penDown = !penDown;
      if (penDown) begin(spot);
      else open = null;
    }
    showRing(spot);
  } else return;
  event.preventDefault();
}

function moveSpot([right, down], by) {
  const { width, height } = canvas();
  spot = [
    Math.min(Math.max(spot[0] + right * by, 0), width),
    Math.min(Math.max(spot[1] + down * by, 0), height),
  ];
  if (penDown && open) extend([spot]);
}

function showBrush() {
  byId("mask-size-told").textContent = `${byId("mask-size").value} pixels`;
  if (spot) showRing(spot);
}

function showRing([x, y]) {
  const ring = byId("mask-ring");
  const { width, height } = canvas();
  ring.hidden = false;
  ring.classList.toggle("down", penDown);
  ring.style.left = `${(100 * x) / width}%`;
  ring.style.top = `${(100 * y) / height}%`;
  ring.style.width = `${(100 * byId("mask-size").valueAsNumber) / width}%`;
}

async function finish() {
  byId("mask-ring").hidden = true;
  if (byId("painter").returnValue !== "done") return;
  const drawing = context();
  const { width, height } = canvas();
  // A clear pixel is 0 as a whole.
  const pixels = new Uint32Array(drawing.getImageData(0, 0, width, height).data.buffer);
  if (pixels.every((pixel) => !pixel)) return setPictures("mask", [], true);
  tint(drawing, "#fff");
  drawing.globalCompositeOperation = "destination-over";
  drawing.fillStyle = "#000";
  drawing.fillRect(0, 0, width, height);
  const file = await new Promise((resolve) => canvas().toBlob(resolve, "image/png"));
  setPictures("mask", [{ file, name: "painted mask", width: picture.width, height: picture.height }], true);
}
