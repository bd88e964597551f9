// The models: the menu of the header, the table, and what a management key lets its owner do with them.

import { call, json } from "./api.js";
import { $, el, megabytes, ms, say, table } from "./dom.js";
import { Refusal } from "./refusal.js";

const SIGNS = { ready: "●", loading: "◔", available: "○", failed: "✕", remote: "↓" };
const WORDS = { ready: "in memory", loading: "loading", available: "on disk", failed: "failed", remote: "can be fetched" };
const KEY = "pvt-serve-management-key";
const SECONDS = 5; // how long one request waits for a load, before the table shows how far it is
const busy = new Map(); // what is being done, by model
let refusal = null;
let looks = 0; // at the models, so far
let watching = 0; // the timer of the next look at what is loading

const managementKey = () => sessionStorage.getItem(KEY) || "";

function state(model) {
  const { bytes, total } = model.pull ?? {};
  const fetched = total ? `, ${Math.round((100 * bytes) / total)} % fetched` : bytes ? `, ${megabytes(bytes)} fetched` : "";
  return `${SIGNS[model.state] ?? "?"} ${WORDS[model.state] ?? model.state}${fetched}${model.pinned ? ", pinned" : ""}`;
}

/** Fill the menu with the models of the store. */
export async function menu() {
  const { models } = await json("models");
  const local = models.filter((each) => each.state !== "remote" && each.state !== "failed");
  const before = $("model").value;
  $("model").replaceChildren(...local.map((each) => el("option", { value: each.id }, `${each.id} · ${state(each)}`)));
  const known = local.find((each) => each.id === before) ?? local.find((each) => each.default) ?? local[0];
  if (known) $("model").value = known.id;
}

/** The model that the menu has chosen, in full; null if the store has none. */
export async function chosen() {
  const id = $("model").value;
  return id ? json(`models/${encodeURIComponent(id)}`) : null;
}

export function describe(model) {
  if (!model) return "The store has no model that can serve.";
  const parts = [
    model.state_text,
    model.input_size?.join(" × "),
    model.num_classes ? `${model.num_classes} classes` : "embeddings only",
    model.backend && `${model.backend} on ${model.device}, ${model.precision}`,
    model.memory_bytes && megabytes(model.memory_bytes),
    model.accuracy?.top1 && `top-1 ${(100 * model.accuracy.top1).toFixed(1)} % (${model.accuracy.dataset})`,
  ];
  return `${model.id}: ${parts.filter(Boolean).join(" · ")}`;
}

export async function showTable() {
  const turn = ++looks;
  const [{ models }, { memory }] = await Promise.all([json("models"), json("stats")]);
  if (turn !== looks) return; // a newer look is under way
  const manages = $("manage-note").dataset.way === "open" || Boolean(managementKey());
  const rows = models.map((each) => [
    el("strong", {}, each.id), el("span", { class: "state" }, state(each)), ...(manages ? [actions(each)] : []), each.version || "–",
    [each.memory_bytes ? megabytes(each.memory_bytes) : "–", true],
    [each.parameters ? `${(each.parameters / 1e6).toFixed(1)} M` : "–", true],
    each.input_size?.join("\u00a0×\u00a0") ?? "–",
    [each.accuracy?.top1 ? `${(100 * each.accuracy.top1).toFixed(1)} %` : "–", true],
    each.precision ? `${each.backend}, ${each.precision}` : "–",
    each.batch_plan?.map(({ size, ms: time }) => `${size}:\u00a0${ms(time)}`).join(", ") ?? "–",
    [each.reason, ...(each.notes ?? []), each.aliases?.length ? `alias ${each.aliases.join(", ")}` : "", each.licence].filter(Boolean).join("; "),
  ]);
  const focused = document.activeElement?.closest?.("[data-model]")?.dataset.model;
  table($("models-table"), ["Model", "State", ...(manages ? ["Manage"] : []), "Version", ["Memory", true], ["Parameters", true], "Input", ["Top-1", true], "Runs as", "Batch plan", "Notes"], rows);
  if (focused) $("models-table").querySelector(`[data-model="${CSS.escape(focused)}"] button`)?.focus();
  if (models.some((each) => each.state === "loading")) watch();
  const taken = Object.values(memory.models_bytes).reduce((sum, each) => sum + each, 0);
  $("models-memory").textContent = `Models in memory take ${megabytes(taken)}`
    + (memory.models_budget_bytes === null ? "; there is no budget (PVT_MEMORY_BUDGET_MB)." : ` of ${megabytes(memory.models_budget_bytes)} (PVT_MEMORY_BUDGET_MB).`);
}

/** Look again while the table is shown. */
function watch() {
  clearTimeout(watching);
  watching = setTimeout(() => {
    if ($("models").hidden) return;
    if (document.hidden) watch();
    else showTable().catch(failed);
  }, 2000);
}

/** What can be done with `model` now. */
function actions(model) {
  const doing = busy.get(model.id);
  const offered = doing || model.state === "loading" ? [] : {
    ready: model.pinned ? ["Unpin"] : ["Pin", "Unload"], remote: ["Pull"],
  }[model.state] ?? ["Load", "Pin"];
  return el("div", { class: "row", "data-model": model.id }, ...(doing ? [el("span", { class: "hint" }, doing)] : []),
    ...offered.map((name) => {
      const button = el("button", { type: "button", "aria-label": `${name} ${model.id}` }, name);
      button.addEventListener("click", () => act(model.id, name));
      return button;
    }));
}

const DO = {
  Load: loaded, Pull: loaded,
  Pin: async (path) => { await loaded(path); await manage(`${path}/pin`); },
  Unpin: (path) => manage(`${path}/pin`, { method: "DELETE" }),
  Unload: (path) => manage(`${path}/unload`),
};

const manage = (path, { method = "POST", headers } = {}) => call(path, { method, headers, bearer: managementKey() });

/** A model is in memory in the end; the table shows how far it is meanwhile. */
async function loaded(path) {
  while ((await manage(`${path}/load`, { headers: { Prefer: `wait=${SECONDS}` } })).status === 202) await showTable();
}

async function act(id, name) {
  busy.set(id, { Load: "loading…", Pull: "fetching…", Pin: "pinning…", Unpin: "unpinning…", Unload: "unloading…" }[name]);
  refusal.clear();
  await showTable().catch(failed);
  try {
    await DO[name](`models/${encodeURIComponent(id)}`);
    say(`${name} ${id}: done`);
  } catch (error) { failed(error); }
  busy.delete(id);
  await showTable().catch(failed);
  document.dispatchEvent(new Event("managed"));
}

function failed(error) {
  refusal.show(error);
  if (error.status === 401) $("manage-key").focus();
}

function keySet(value) {
  if (value) sessionStorage.setItem(KEY, value);
  else sessionStorage.removeItem(KEY);
  $("manage-key").value = "";
  refusal.clear();
  showTable().catch(failed);
}

export function start() {
  refusal = new Refusal($("manage-problem"));
  $("manage-form").hidden = $("manage-note").dataset.way !== "key";
  $("manage-form").addEventListener("submit", (event) => { event.preventDefault(); keySet($("manage-key").value.trim()); });
  $("manage-forget").addEventListener("click", () => keySet(""));
}
