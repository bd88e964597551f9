// The frame of the page: views, colours, key, model, and whether the service answers.

import { key, reach } from "./api.js";
import * as code from "./code.js";
import * as compare from "./compare.js";
import * as details from "./details.js";
import { $, say } from "./dom.js";
import * as live from "./live.js";
import * as models from "./models.js";
import * as trial from "./try.js";

document.documentElement.dataset.js = "";

function view() {
  const name = location.hash.slice(1) || "try";
  if (!["try", "models", "live"].includes(name)) return;
  for (const each of document.querySelectorAll(".view")) each.hidden = each.id !== name;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${{ try: "Try", models: "Models", live: "Live" }[name]} · pvt-serve`;
  if (name === "live") live.shown();
  if (name === "models") models.showTable().catch(failed);
}

function failed(error) {
  $("model-line").textContent = error.detail ?? String(error);
  if (error.status === 401) {
    $("key-box").open = true;
    say(error.detail);
  }
}

let reloading = 0; // the timer of another attempt
let current = null; // the model, as GET /models/{id} has it

function use(model) {
  current = model;
  $("model-line").textContent = models.describe(model);
  trial.use(model);
  compare.offer();
}

/** Run `job`. What the service refuses for now runs again when it says so, and only that: each request counts there. */
async function untilAllowed(job) {
  clearTimeout(reloading);
  try {
    await job();
  } catch (error) {
    failed(error);
    if (error.retryAfter) reloading = setTimeout(untilAllowed, 1000 * error.retryAfter, job);
  }
}

const loadModel = () => untilAllowed(async () => use(await models.chosen()));
const loadModels = () => untilAllowed(async () => {
  await models.menu();
  loadModel();
});

/** Show how the models are now. */
async function look() {
  current = await models.menu().then(models.chosen).catch(() => current);
  $("model-line").textContent = models.describe(current);
  compare.offer();
}

function theme() {
  const stored = localStorage.getItem("pvt-serve-theme");
  const dark = stored ? stored === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  if (stored) document.documentElement.dataset.theme = stored;
  $("theme").setAttribute("aria-pressed", String(dark));
  return dark;
}

function keySet() {
  $("key-summary").toggleAttribute("data-set", Boolean(key.get()));
  loadModels();
  if (location.hash === "#models") view();
}

$("theme").addEventListener("click", () => {
  localStorage.setItem("pvt-serve-theme", theme() ? "light" : "dark");
  theme();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", theme);
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set($("key").value.trim());
  $("key").value = "";
  $("key-box").open = false;
  keySet();
});
$("key-forget").addEventListener("click", () => { key.set(""); $("key-box").open = false; keySet(); });
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && $("key-box").open) { $("key-box").open = false; $("key-summary").focus(); }
});
$("model").addEventListener("change", loadModel);
document.addEventListener("answered", () => { if (current?.state !== "ready") look(); }); // the first request has loaded it
document.addEventListener("managed", look);
reach.addEventListener("gone", () => live.gone(true));
reach.addEventListener("back", () => { live.gone(false); loadModels(); });
addEventListener("hashchange", view);

theme();
code.start();
trial.start();
details.start();
compare.start();
models.start();
live.start();
view();
keySet();
