// A second image or a second model beside the first: their classes, their embeddings, their stages in the same colours.

import { Problem, call, form, json } from "./api.js";
import { $, el, score } from "./dom.js";
import { Latest } from "./latest.js";
import { Refusal } from "./refusal.js";
import { figures, mapsOf } from "./stages.js";

const CLASSES = 5; // of each
const requests = new Latest();
let refusal = null;
let first = null; // { image, model, images }
let other = null; // the second image; null for the same
let model = null; // the second one, as GET /models/{id} has it; null for the same

/** Compare with this one from now on. */
export function against(next) {
  first = next;
  offer();
  run({ patient: next.image.live });
}

/** The menu of models has changed: so has the one here. */
export function offer() {
  const select = $("other-model"), before = select.value;
  const others = [...$("model").options].filter((each) => each.value !== $("model").value);
  select.replaceChildren(el("option", { value: "" }, "the same model"), ...others.map((each) => el("option", { value: each.value }, each.textContent)));
  select.value = others.some((each) => each.value === before) ? before : "";
  if (!select.value) model = null;
  const strip = (first?.images ?? []).filter((each) => each !== first.image);
  for (const each of $("other-strip").querySelectorAll("img")) URL.revokeObjectURL(each.src);
  $("other-strip").hidden = !strip.length;
  $("other-strip").replaceChildren(...strip.map((image) => {
    const button = el("button", { type: "button", title: image.name }, el("img", { src: URL.createObjectURL(image.blob), alt: `Compare with ${image.name}` }));
    button.addEventListener("click", () => second(image));
    return button;
  }));
}

function second(image) {
  other = image;
  $("other-same").hidden = !image;
  run();
}

/** What the service says of `images`: { predictions, activation, embedding, stages } of each. */
async function ask(model, images, signal) {
  const query = model.default ? {} : { model: model.id };
  let found = { results: images.map(() => ({ predictions: [] })) };
  if (model.labels?.length) {
    const response = await call("predict", {
      method: "POST", body: form(images), query: { ...query, top_k: Math.min(model.labels.length, 1000) },
      headers: { Prefer: "respond-async" }, signal,
    });
    found = await response.json();
  }
  for (const { error } of found.results) if (error) throw new Problem(error.title, error.detail, error.status, null, error.request_id);
  const maps = await mapsOf(images, query, signal, { embedding: true });
  return maps.map((each, n) => ({ ...each, predictions: found.results[n].predictions, activation: found.activation, model }));
}

function run({ patient = false } = {}) {
  refusal.stop();
  const on = !$("compare").hidden, both = other || model;
  $("compare-hint").hidden = Boolean(both && first);
  if (!both) { requests.stop(); $("compared").hidden = true; refusal.clear(); }
  if (!on || !first || !both) return;
  requests.run(async (signal) => {
    $("compared").classList.add("stale");
    try {
      const images = [first.image, other ?? first.image], models = [first.model, model ?? first.model];
      const same = models[0].id === models[1].id;
      const sides = same ? await ask(models[0], images, signal)
        : [...await ask(models[0], [images[0]], signal), ...await ask(models[1], [images[1]], signal)];
      if (signal.aborted) return;
      show(sides, images, same);
      refusal.clear();
    } catch (error) {
      if (signal.aborted || error.name === "AbortError") throw error;
      refusal.show(error, run);
    }
  }, { patient });
}

function show(sides, images, same) {
  $("compared").hidden = false;
  $("compared").classList.remove("stale");
  for (const each of $("pair").querySelectorAll("img")) URL.revokeObjectURL(each.src);
  $("pair").replaceChildren(...images.map((image, n) => el("figure", {},
    el("img", { src: URL.createObjectURL(image.blob), alt: `${n ? "Second" : "First"} image, ${image.name}` }),
    el("figcaption", {}, el("strong", {}, sides[n].predictions[0]?.label ?? ""), ` ${image.name}${same ? "" : `, ${sides[n].model.id}`}`))));
  mirror(sides, same);
  $("cosine").replaceChildren(...cosineOf(sides, same));
  const shared = sides[0].stages.every(({ shape }, n) => shape[0] === sides[1].stages[n].shape[0]);
  $("compare-basis").textContent = shared ? "Red, green and blue are the principal components of both together."
    : "Their maps have different channels, so each has colours of its own.";
  $("compare-stages").replaceChildren(...figures(sides));
}

/** The best classes of both, the first's bars to the left of the names and the second's to the right. */
function mirror(sides, same) {
  const key = (each) => (same ? each.class_id : each.label); // labels may occur twice in a model
  const scores = sides.map(({ predictions }) => new Map([...predictions].reverse().map((each) => [key(each), each.score])));
  const names = new Map(sides.flatMap(({ predictions }) => predictions.slice(0, CLASSES).map((each) => [key(each), each.label])));
  const best = ([id]) => Math.max(...scores.map((each) => each.get(id) ?? -Infinity));
  const rows = [...names].sort((a, b) => best(b) - best(a));
  const logits = sides.some(({ activation }) => activation === "none");
  const full = logits ? Math.max(...rows.map(best), 1e-9) : 1;
  const cell = (n, id) => {
    const value = scores[n].get(id), fill = el("span", { class: "fill" });
    fill.style.width = `${Math.max(0, (100 * (value ?? 0)) / full)}%`;
    return el("td", { "data-score": String(value ?? "") }, fill, el("span", {}, value === undefined ? "–" : score(value, sides[n].activation)));
  };
  $("mirror").hidden = !rows.length;
  $("mirror").replaceChildren(
    el("caption", { class: "sr" }, "Scores of the classes, the first on the left"),
    el("thead", {}, el("tr", {}, ...["First", "Class", "Second"].map((each) => el("th", { scope: "col" }, each)))),
    el("tbody", {}, ...rows.map(([id, label]) => el("tr", {}, cell(0, id), el("th", { scope: "row" }, label), cell(1, id)))),
  );
}

function cosineOf([{ embedding: a }, { embedding: b }], same) {
  if (a.length !== b.length) return [`The embeddings have ${a.length} and ${b.length} numbers, so they have no cosine.`];
  const dot = (u, v) => u.reduce((sum, each, n) => sum + each * v[n], 0);
  return [
    el("strong", {}, `cosine ${(dot(a, b) / Math.sqrt(dot(a, a) * dot(b, b))).toFixed(4)}`), ` of the two embeddings, ${a.length} numbers each.`,
    same ? "" : " Two models have the same axes only if one was trained from the other.",
  ];
}

function open(on) {
  $("compare").hidden = !on;
  $("compare-toggle").setAttribute("aria-pressed", String(on));
  if (!on) return requests.stop();
  location.hash = "#try";
  offer();
  run();
  $("compare").scrollIntoView({ block: "nearest" });
  return undefined;
}

export function start() {
  refusal = new Refusal($("compare-problem"));
  $("compare-toggle").addEventListener("click", () => open($("compare").hidden));
  $("other-choose").addEventListener("click", () => $("other-file").click());
  $("other-file").addEventListener("change", () => {
    const [blob] = $("other-file").files;
    $("other-file").value = "";
    if (blob) second({ blob, name: blob.name });
  });
  $("other-same").addEventListener("click", () => second(null));
  $("other-model").addEventListener("change", async () => {
    const id = $("other-model").value;
    try {
      const found = id ? await json(`models/${encodeURIComponent(id)}`) : null;
      if ($("other-model").value !== id) return;
      model = found;
      run();
    } catch (error) { refusal.show(error); }
  });
}
