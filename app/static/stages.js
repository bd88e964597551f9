// The four feature maps of images, in colours.

import { call, form } from "./api.js";
import { el } from "./dom.js";
import { paint, readSafetensors } from "./pca.js";

const STRIDES = [4, 8, 16, 32];

/** Of each image { name, stages, embedding }: four maps { shape, data }, and a vector if `embedding`. */
export async function mapsOf(images, query, signal, { embedding = false } = {}) {
  const response = await call("features", {
    method: "POST", body: form(images), query: { ...query, embedding, stages: "1,2,3,4" },
    headers: { Accept: "application/vnd.safetensors" }, signal,
  });
  const arrays = readSafetensors(await response.arrayBuffer());
  const one = ({ shape, data }, n) => {
    const size = data.length / shape[0];
    return { shape: shape.slice(1), data: data.subarray(n * size, (n + 1) * size) };
  };
  return images.map(({ name }, n) => ({
    name,
    stages: STRIDES.map((_, stage) => one(arrays[`stage${stage + 1}`], n)),
    embedding: embedding ? one(arrays.embedding, n).data : null,
  }));
}

/** A figure for each stage, with a canvas for each of `items`, which share its colours where their channels allow. */
export function figures(items) {
  return STRIDES.map((stride, n) => {
    const maps = items.map(({ stages }) => stages[n]);
    const canvases = items.map(({ name }) => {
      const canvas = el("canvas", { role: "img", title: name });
      canvas.setAttribute("aria-label", `Stage ${n + 1} of ${name} in three colours`);
      return canvas;
    });
    if (maps.every(({ shape }) => shape[0] === maps[0].shape[0])) paint(canvases, maps);
    else canvases.forEach((canvas, i) => paint([canvas], [maps[i]]));
    const sizes = [...new Set(maps.map(({ shape: [channels, height, width] }) => `${width} × ${height}, ${channels} channels`))];
    return el("figure", {}, el("div", { class: "maps" }, ...canvases), el("figcaption", {}, `${n + 1}: ${sizes.join("; ")}, stride ${stride}`));
  });
}
