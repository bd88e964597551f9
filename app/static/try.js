// Images in, classes out: every way to give an image, the answer, and what can go wrong.

import { Problem, call, form, timing } from "./api.js";
import * as code from "./code.js";
import * as compare from "./compare.js";
import * as details from "./details.js";
import { $, el, ms, say, score } from "./dom.js";
import { Pad, render } from "./draw.js";
import { Latest } from "./latest.js";
import { Refusal } from "./refusal.js";

const SAMPLES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"];
const CAMERA_SIDE = 320;
const requests = new Latest(), refusal = new Refusal($("problem"));
let model = null; // as GET /models/{id} has it
let images = []; // { blob, name, live }
let chosen = 0; // of several images
let answer = null; // of them
let camera = null; // its stream

const query = () => (model && !model.default ? { model: model.id } : {});

/** Use this model from now on; an image that is there is sent to it. */
export function use(next) {
  model = next;
  $("more").hidden = true;
  const digits = model?.labels?.length === 10 && model.labels.every((label, n) => label === String(n));
  $("draw").hidden = !digits;
  if (!digits && !$("pad").hidden) drawing(false);
  code.show(query());
  if (images.length) classify();
}

function setPreview(image) {
  $("invite").hidden = true;
  const preview = $("preview");
  URL.revokeObjectURL(preview.src);
  preview.hidden = false;
  preview.alt = `The image ${image.name}`;
  preview.src = URL.createObjectURL(image.blob);
}

/** Show these images and send them. */
export async function take(list) {
  if (!list.length) return;
  drawing(false);
  await film(false);
  images = list;
  chosen = 0;
  setPreview(images[0]);
  showStrip();
  code.show(query(), images[0].name);
  classify();
}

function showStrip() {
  const several = images.length > 1;
  $("strip").hidden = !several;
  $("strip-tools").hidden = true;
  for (const each of $("strip").querySelectorAll("img")) URL.revokeObjectURL(each.src);
  $("strip").replaceChildren(...(several ? images : []).map(({ blob, name }, n) => {
    const button = el("button", { type: "button", title: name, "aria-pressed": String(n === chosen) },
      el("img", { src: URL.createObjectURL(blob), alt: name }), el("span", {}, "…"));
    button.addEventListener("click", () => choose(n));
    return button;
  }));
}

function choose(n) {
  chosen = n;
  [...$("strip").children].forEach((button, i) => button.setAttribute("aria-pressed", String(i === n)));
  setPreview(images[n]);
  if (answer) showResult();
}

/** Ask for the classes of the images. Returns what went wrong, if anything did. */
async function classify({ patient = false, quiet = false } = {}) {
  refusal.stop();
  let problem = null;
  await requests.run(async (signal) => {
    const sent = images;
    running(true);
    if (!quiet) say("Reading the image");
    try {
      const response = await call("predict", {
        method: "POST", body: form(sent), query: query(), headers: { Prefer: "respond-async" }, signal,
      });
      const found = await response.json();
      if (signal.aborted || sent !== images) return;
      answer = { ...found, id: response.headers.get("X-Request-ID"), times: timing(response) };
      showResult(quiet);
      document.dispatchEvent(new Event("answered"));
    } catch (error) {
      if (signal.aborted || error.name === "AbortError") return;
      problem = error;
      show(error);
      if (error.status === 503) document.dispatchEvent(new Event("answered")); // its state may have changed
    }
  }, { patient });
  return problem;
}

/** What is shown is not the answer to the newest image; it stays, dimmed. */
function running(on) {
  for (const id of ["answer", "more"]) $(id).classList.toggle("stale", on);
  $("answer").setAttribute("aria-busy", String(on));
  $("empty").textContent = "Reading the image…";
  $("empty").hidden = !on || !$("result").hidden;
}

function show(error) {
  $("answer").setAttribute("aria-busy", "false");
  $("empty").hidden = true;
  refusal.show(error, camera ? null : classify);
  if (error.status === 401) $("key-box").open = true;
}

function showResult(quiet = false) {
  const result = answer.results[chosen], several = answer.results.length > 1;
  running(false);
  if (several) showLabels();
  if (result.error) {
    show(new Problem(result.error.title, result.error.detail, result.error.status, null, result.error.request_id));
    $("result").hidden = $("more").hidden = true;
    return;
  }
  refusal.clear();
  $("result").hidden = false;
  const [best] = result.predictions;
  $("best").replaceChildren(...(best ? [best.label, " ", el("small", {}, score(best.score, answer.activation))] : ["No class reaches its threshold"]));
  if (result.unknown) $("best").append(el("small", {}, " · unknown: below the model's bound"));
  const scores = result.predictions.map((each) => each.score);
  const top = answer.activation === "none" ? Math.max(...scores, 0) : 1, low = answer.activation === "none" ? Math.min(...scores, 0) : 0;
  $("bars").replaceChildren(...result.predictions.map((each) => {
    const fill = el("span", { class: "fill" });
    fill.style.width = `${(100 * (each.score - low)) / (top - low || 1)}%`;
    return el("li", { "data-score": String(each.score) }, fill, el("span", { class: "name" }, each.label),
      el("span", { class: "score" }, score(each.score, answer.activation)));
  }));
  showTiming();
  $("request-id").textContent = answer.id;
  if (!quiet) say(best ? `${best.label}, ${score(best.score, answer.activation)}` : "No class reaches its threshold");
  if (camera) return;
  details.show({ images, results: answer.results, chosen, model, query: query() });
  compare.against({ image: images[chosen], model, images });
}

function showTiming() {
  const total = answer.times.find(([name]) => name === "total")?.[1] ?? 0;
  const parts = answer.times.filter(([name]) => name !== "total");
  const other = total - parts.reduce((sum, [, time]) => sum + time, 0);
  if (other > 0.005) parts.push(["other", other]);
  $("timing").replaceChildren(
    el("div", { class: "stack", "aria-hidden": "true" }, ...parts.map(([name, time]) => {
      const part = el("span", { class: `k-${name}` });
      part.style.flexGrow = time;
      return part;
    })),
    el("ul", { class: "legend" }, el("li", {}, el("strong", {}, `${ms(total)} in the service`)),
      ...parts.map(([name, time]) => el("li", {}, el("i", { class: `k-${name}` }), `${name} ${ms(time)}`))),
  );
}

function showLabels() {
  $("strip-tools").hidden = false;
  [...$("strip").children].forEach((button, n) => {
    const { error, predictions } = answer.results[n];
    button.lastChild.textContent = error ? "✕ error" : predictions[0]?.label ?? "none";
  });
}

function drawing(on) {
  $("pad").hidden = $("clear").hidden = !on;
  $("draw").setAttribute("aria-pressed", String(on));
  $("input-note").textContent = on ? "Draw one digit; its ink is cut out and made like the images that the model was trained on." : "";
  if (!on) return;
  film(false);
  requests.stop();
  refusal.stop();
  pad.clear();
  images = [];
  showStrip();
  $("preview").hidden = $("invite").hidden = true;
}

const pad = new Pad($("pad"), async (strokes) => {
  const blob = await render(strokes).convertToBlob({ type: "image/png" });
  if ($("pad").hidden || !pad.strokes.length) return;
  images = [{ blob, name: "drawing.png", live: true }];
  chosen = 0;
  code.show(query(), "drawing.png");
  classify({ patient: true });
});

/** The camera on or off: one request is under way at a time, of the newest frame. */
async function film(on) {
  camera?.getTracks().forEach((track) => track.stop());
  camera = null;
  const video = $("video");
  video.hidden = !on;
  $("camera").setAttribute("aria-pressed", String(on));
  if (!on) return;
  try {
    camera = await navigator.mediaDevices.getUserMedia({ video: { width: 640, height: 480 } });
  } catch (error) {
    video.hidden = true;
    $("camera").setAttribute("aria-pressed", "false");
    $("input-note").textContent = `The camera is off: ${error.message || error.name}.`;
    return;
  }
  drawing(false);
  $("preview").hidden = $("invite").hidden = $("more").hidden = true;
  images = [];
  showStrip();
  video.srcObject = camera;
  await video.play();
  const own = camera, canvas = new OffscreenCanvas(CAMERA_SIDE, CAMERA_SIDE);
  while (camera === own) {
    const scale = CAMERA_SIDE / Math.max(video.videoWidth, video.videoHeight);
    [canvas.width, canvas.height] = [video.videoWidth * scale, video.videoHeight * scale];
    canvas.getContext("2d").drawImage(video, 0, 0, canvas.width, canvas.height);
    images = [{ blob: await canvas.convertToBlob({ type: "image/jpeg" }), name: "camera.jpg", live: true }];
    chosen = 0;
    const problem = await classify({ patient: true, quiet: true });
    if (problem) await new Promise((go) => { setTimeout(go, 1000 * (problem.retryAfter ?? 2)); });
    await new Promise(requestAnimationFrame); // none comes while the page is hidden
  }
}

function save(name, type, text) {
  const link = el("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function csv() {
  // A cell that begins like a formula would run as one in a spreadsheet.
  const cell = (value) => `"${String(value).replace(/^[=+\-@\t\r](?![\d.]+$)/, "'$&").replaceAll('"', '""')}"`;
  const rows = answer.results.flatMap((result, n) => (result.error
    ? [[images[n].name, "", "", "", "", result.error.detail]]
    : result.predictions.map((each, rank) => [images[n].name, rank + 1, each.class_id, each.label, each.score, ""])));
  return [["file", "rank", "class_id", "label", "score", "error"], ...rows].map((row) => row.map(cell).join(",")).join("\r\n");
}

const files = (list) => take([...list].map((blob) => ({ blob, name: blob.name || "pasted.png" })));

export function start() {
  const preview = $("preview"), drop = $("drop");
  preview.addEventListener("load", () => preview.classList.toggle("small", preview.naturalWidth <= 128));
  preview.addEventListener("error", () => {
    if (preview.hidden) return;
    preview.hidden = true;
    $("invite").hidden = false;
    $("invite").textContent = "This browser can't show the file. The service may read it.";
  });
  $("choose").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", () => { files($("file").files); $("file").value = ""; });
  for (const kind of ["dragenter", "dragover"]) addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add("over"); });
  addEventListener("dragleave", (event) => { if (!event.relatedTarget) drop.classList.remove("over"); });
  addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    files(event.dataTransfer.files);
  });
  addEventListener("paste", (event) => files(event.clipboardData.files));
  $("draw").addEventListener("click", () => drawing($("pad").hidden));
  $("clear").addEventListener("click", () => { pad.clear(); $("pad").focus(); });
  const usable = navigator.mediaDevices?.getUserMedia;
  $("camera").disabled = !usable;
  if (!usable) $("camera").title = "Browsers allow the camera only on https:// and on localhost.";
  $("camera").addEventListener("click", () => (camera ? film(false) : film(true)));
  $("samples").replaceChildren(...SAMPLES.map((name) => {
    const address = new URL(`samples/${name}.png`, import.meta.url);
    const button = el("button", { type: "button", title: `${name}.png` }, el("img", { src: address.href, alt: `Sample: ${name}`, width: 44, height: 44 }));
    button.addEventListener("click", async () => take([{ blob: await (await fetch(address)).blob(), name: `${name}.png` }]));
    return button;
  }));
  $("save-csv").addEventListener("click", () => save("classes.csv", "text/csv", csv()));
  $("save-json").addEventListener("click", () => {
    const { id, times, ...plain } = answer;
    save("classes.json", "application/json", JSON.stringify(plain, null, 1));
  });
}
