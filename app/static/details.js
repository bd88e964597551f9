// What the model sees in an image: the map of a class, and the four stages; at its own input size or a larger one.

import { $, el } from "./dom.js";
import { Latest } from "./latest.js";
import { Refusal } from "./refusal.js";
import { figures, mapsOf } from "./stages.js";
import * as where from "./where.js";

const SIDES = [128, 224, 320, 448]; // of the larger sizes; a cell of the map is 32 pixels
const requests = new Latest();
let shown = null; // { images, results, chosen, model, query }
let map = null, stages = null; // what is refused of each
let painted = false; // the stages are

const asQuery = ([height, width]) => (height === width ? String(height) : `${height}x${width}`); // as `size=` has it

/** The model's own size, and larger ones of the same shape. Where its card names one for maps, that is not the own one. */
function sizes({ input_size: [height, width] = [224, 224], explain_size: best = null } = {}) {
  const longest = Math.max(height, width), round = (side) => 32 * Math.round(side / 32);
  const sides = [...new Set([...SIDES, ...(best ? [Math.max(...best)] : [])])].filter((side) => side > longest).sort((a, b) => a - b);
  const larger = sides.map((side) => [round((side * height) / longest), round((side * width) / longest)]);
  return [
    [best ? asQuery([height, width]) : "", `${width} × ${height}, the model's`],
    ...larger.map(([h, w]) => [asQuery([h, w]), `${w} × ${h}`]),
  ];
}

function choices() {
  const { model, results, chosen, images } = shown, { predictions } = results[chosen];
  const labels = model?.labels ?? predictions.map((each) => each.label);
  const options = (select, pairs, value) => {
    select.replaceChildren(...pairs.map(([key, text]) => el("option", { value: key }, text)));
    if (pairs.some(([key]) => String(key) === value)) select.value = value;
  };
  options($("where-class"), labels.map((label, n) => [model?.labels ? n : predictions[n].class_id, label]), String(predictions[0]?.class_id));
  options($("size"), sizes(model ?? {}), $("size").value || (model?.explain_size ? asQuery(model.explain_size) : ""));
  $("basis-label").hidden = images.length < 2;
  if (images.length < 2) $("basis").value = "one";
}

/** Show the details of the image that is chosen. */
export function show(next) {
  shown = next;
  $("more").hidden = false;
  choices();
  run({ patient: next.images[next.chosen].live });
}

/** Ask for what is not there yet; `anew` for the stages too. */
function run({ anew = true, patient = false } = {}) {
  map.stop();
  if (anew) { painted = false; stages.stop(); }
  requests.run(async (signal) => {
    if (shown.model?.tasks?.includes("explain") ?? true) await part(map, signal, () => run({ anew: false }), explain);
    if (!painted) await part(stages, signal, run, showStages);
  }, { patient });
}

async function part(refusal, signal, again, job) {
  try {
    await job(signal);
    refusal.clear();
  } catch (error) {
    if (signal.aborted || error.name === "AbortError") throw error;
    refusal.show(error, again);
  }
}

const query = () => ({ ...shown.query, size: $("size").value });

const explain = (signal) => where.explain(
  shown.images[shown.chosen], { query: query(), classId: $("where-class").value, activation: shown.model?.activation }, signal,
);

async function showStages(signal) {
  const all = $("basis").value === "all";
  const images = shown.images.filter((_, n) => (all ? !shown.results[n].error : n === shown.chosen));
  const maps = await mapsOf(images, query(), signal);
  if (signal.aborted) return;
  $("stages").classList.toggle("several", images.length > 1);
  $("stages").replaceChildren(...figures(maps));
  painted = true;
}

export function start() {
  [map, stages] = [new Refusal($("where-problem")), new Refusal($("stages-problem"))];
  $("opacity").addEventListener("input", where.paint);
  $("where-class").addEventListener("change", () => run({ anew: false }));
  $("size").addEventListener("change", () => run());
  $("basis").addEventListener("change", () => run());
}
