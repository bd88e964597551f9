// The models: the menu of the header, and the table.

import { json } from "./api.js";
import { $, el, megabytes, ms, table } from "./dom.js";

const SIGNS = { ready: "●", loading: "◔", available: "○", failed: "✕", remote: "↓" };
const WORDS = { ready: "in memory", loading: "loading", available: "on disk", failed: "failed", remote: "can be fetched" };
const state = (model) => `${SIGNS[model.state] ?? "?"} ${WORDS[model.state] ?? model.state}`;

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
  const { models } = await json("models");
  const rows = models.map((each) => [
    el("strong", {}, each.id), each.version || "–", el("span", { class: "state" }, state(each)),
    [each.memory_bytes ? megabytes(each.memory_bytes) : "–", true],
    [each.parameters ? `${(each.parameters / 1e6).toFixed(1)} M` : "–", true],
    each.input_size?.join(" × ") ?? "–",
    [each.accuracy?.top1 ? `${(100 * each.accuracy.top1).toFixed(1)} %` : "–", true],
    each.precision ? `${each.backend}, ${each.precision}` : "–",
    each.batch_plan?.map(({ size, ms: time }) => `${size}: ${ms(time)}`).join(", ") ?? "–",
    [each.reason, ...(each.notes ?? []), each.aliases?.length ? `alias ${each.aliases.join(", ")}` : "", each.licence].filter(Boolean).join("; "),
  ]);
  table($("models-table"), ["Model", "Version", "State", ["Memory", true], ["Parameters", true], "Input", ["Top-1", true], "Runs as", "Batch plan", "Notes"], rows);
}
