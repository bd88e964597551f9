// The class activation map on the part of the image that the model saw.

import { call, form, json } from "./api.js";
import { $, el, score } from "./dom.js";
import { VIRIDIS } from "./viridis.js";

const SIDE = 512; // of the canvas's longer side

/** The number at each of width x height points of `map`, bilinear between the middles of its cells. */
export function enlarged(map, width, height) {
  const rows = map.length, columns = map[0].length, values = new Float32Array(width * height);
  const place = (n, cells, points) => {
    const at = Math.min(Math.max(((n + 0.5) * cells) / points - 0.5, 0), cells - 1);
    const low = Math.min(Math.floor(at), Math.max(cells - 2, 0));
    return [low, Math.min(low + 1, cells - 1), at - low];
  };
  const across = Array.from({ length: width }, (_, x) => place(x, columns, width));
  for (let y = 0; y < height; y++) {
    const [above, below, v] = place(y, rows, height);
    across.forEach(([left, right, u], x) => {
      values[y * width + x] = (1 - v) * ((1 - u) * map[above][left] + u * map[above][right])
        + v * ((1 - u) * map[below][left] + u * map[below][right]);
    });
  }
  return values;
}

async function cropOf(image, crop, width, height, query, signal) {
  const canvas = new OffscreenCanvas(width, height), context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  try {
    const bitmap = await createImageBitmap(image.blob);
    context.drawImage(bitmap, crop.left, crop.top, crop.right - crop.left, crop.bottom - crop.top, 0, 0, width, height);
  } catch { // a format that this browser does not read
    const picture = await call("explain", {
      method: "POST", body: form([image]), query: { ...query, alpha: 0, output_size: SIDE }, headers: { Accept: "image/png" }, signal,
    });
    context.drawImage(await createImageBitmap(await picture.blob()), 0, 0, width, height);
  }
  return canvas;
}

/** The map over its range, as an image of its own. */
function colours(map, width, height) {
  const canvas = new OffscreenCanvas(width, height), context = canvas.getContext("2d");
  const image = context.createImageData(width, height), cells = map.flat();
  const least = Math.min(...cells), range = Math.max(...cells) - least;
  enlarged(map, width, height).forEach((value, n) => {
    image.data.set(VIRIDIS[range ? Math.round((255 * (value - least)) / range) : 0], 4 * n);
    image.data[4 * n + 3] = 255;
  });
  context.putImageData(image, 0, 0);
  return canvas;
}

let layers = null; // of what is shown: the crop, and the colours

export function paint() {
  if (!layers) return;
  const canvas = $("overlay"), context = canvas.getContext("2d");
  [canvas.width, canvas.height] = [layers.crop.width, layers.crop.height];
  context.drawImage(layers.crop, 0, 0);
  context.globalAlpha = $("opacity").value / 100;
  context.drawImage(layers.map, 0, 0);
}

function scale(cells) {
  $("scale").hidden = false;
  $("scale-low").textContent = Math.min(...cells).toFixed(2);
  $("scale-high").textContent = Math.max(...cells).toFixed(2);
  const context = $("scale-bar").getContext("2d");
  VIRIDIS.forEach(([r, g, b], n) => { context.fillStyle = `rgb(${r} ${g} ${b})`; context.fillRect(n, 0, 1, 10); });
}

/** Ask for the map of a class (of the most likely one without `classId`), and show it with its numbers. */
export async function explain(image, { query, classId, activation }, signal) {
  const answer = await json("explain", {
    method: "POST", body: form([image]), query: { ...query, class_id: classId }, headers: { Accept: "application/json" }, signal,
  });
  const [found] = answer.results, [height, width] = answer.size, most = Math.max(width, height);
  const [w, h] = [Math.round((SIDE * width) / most), Math.round((SIDE * height) / most)];
  const crop = await cropOf(image, found.crop, w, h, query, signal);
  if (signal.aborted) return;
  layers = { crop, map: colours(found.map, w, h) };
  paint();
  const cells = found.map.flat(), mean = cells.reduce((sum, each) => sum + each, 0) / cells.length;
  scale(cells);
  const holds = Math.abs(mean + found.bias - found.logit) < 0.005 * Math.max(1, Math.abs(found.logit));
  $("overlay").setAttribute("aria-label", `Class activation map of ${found.label} on the model's crop`);
  $("identity").replaceChildren(
    el("strong", {}, `mean ${mean.toFixed(4)} + bias ${found.bias.toFixed(4)} = ${(mean + found.bias).toFixed(4)}`),
    ` ${holds ? "is" : "differs from"} the logit ${found.logit.toFixed(4)} of ${found.label}${holds ? " ✓" : ""}, whose score is ${score(found.score, activation)}. `
      + `${found.map[0].length} × ${found.map.length} cells, each of 32 × 32 pixels of the ${width} × ${height} input.`,
  );
  const small = cells.length <= 16;
  $("map-table").hidden = !small;
  $("map-table").replaceChildren(...(small ? [
    el("caption", { class: "sr" }, "The map's numbers"),
    ...found.map.map((row) => el("tr", {}, ...row.map((each) => el("td", {}, each.toFixed(3))))),
  ] : []));
}
