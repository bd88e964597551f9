// Feature maps from safetensors, and their principal components as colours.

/** Arrays of a safetensors file by name: { shape, data }. */
export function readSafetensors(buffer) {
  const length = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const arrays = {};
  delete header.__metadata__;
  for (const [name, { dtype, shape, data_offsets: [from, to] }] of Object.entries(header)) {
    if (dtype !== "F32") throw new Error(`${name} is ${dtype}`);
    arrays[name] = { shape, data: new Float32Array(buffer.slice(8 + length + from, 8 + length + to)) };
  }
  return arrays;
}

const dot = (a, b) => { let sum = 0; for (let i = 0; i < a.length; i++) sum += a[i] * b[i]; return sum; };

/** Orthonormal vectors that span `vectors` (Gram and Schmidt, twice). */
function orthonormal(vectors) {
  const basis = [];
  for (const vector of vectors) {
    for (let pass = 0; pass < 2; pass++) for (const other of basis) {
      const share = dot(vector, other);
      for (let i = 0; i < vector.length; i++) vector[i] -= share * other[i];
    }
    const norm = Math.sqrt(dot(vector, vector));
    basis.push(norm > 1e-12 ? vector.map((each) => each / norm) : new Float64Array(vector.length));
  }
  return basis;
}

/** Eigenvalues and eigenvectors of a small symmetric matrix (Jacobi's rotations), the largest first. */
function eigen(a) {
  const n = a.length, v = a.map((_, i) => a.map((__, j) => Number(i === j)));
  for (let sweep = 0; sweep < 30; sweep++) for (let p = 0; p < n; p++) for (let q = p + 1; q < n; q++) {
    if (Math.abs(a[p][q]) < 1e-300) continue;
    const theta = (a[q][q] - a[p][p]) / (2 * a[p][q]);
    const t = (Math.sign(theta) || 1) / (Math.abs(theta) + Math.hypot(theta, 1));
    const c = 1 / Math.hypot(t, 1), s = t * c;
    for (let k = 0; k < n; k++) { const x = a[k][p], y = a[k][q]; a[k][p] = c * x - s * y; a[k][q] = s * x + c * y; }
    for (let k = 0; k < n; k++) { const x = a[p][k], y = a[q][k]; a[p][k] = c * x - s * y; a[q][k] = s * x + c * y; }
    for (let k = 0; k < n; k++) { const x = v[k][p], y = v[k][q]; v[k][p] = c * x - s * y; v[k][q] = s * x + c * y; }
  }
  return a.map((_, i) => i).sort((i, j) => a[j][j] - a[i][i]).map((i) => ({ value: a[i][i], vector: v.map((row) => row[i]) }));
}

/** The scores of `positions` vectors of `channels` (channel by channel in `data`) on their three principal components:
 * three arrays, of which the number that is farthest from 0 is positive. Fewer dimensions leave arrays of 0. */
export function principal(data, channels, positions) {
  // The smaller of the two Gram matrices has the same eigenvalues.
  const rows = Array.from({ length: channels }, (_, c) => {
    const row = Float64Array.from(data.subarray(c * positions, (c + 1) * positions));
    const mean = row.reduce((sum, each) => sum + each, 0) / positions;
    return row.map((each) => each - mean);
  });
  const byPosition = positions <= channels;
  const items = byPosition ? Array.from({ length: positions }, (_, n) => Float64Array.from(rows, (row) => row[n])) : rows;
  const gram = items.map(() => new Float64Array(items.length));
  for (let i = 0; i < items.length; i++) for (let j = 0; j <= i; j++) gram[i][j] = gram[j][i] = dot(items[i], items[j]);
  // Subspace iteration with more vectors than needed, then Rayleigh and Ritz.
  let seed = 1;
  const random = () => { seed = (seed * 48271) % 2147483647; return seed / 2147483647 - 0.5; };
  const times = (vector) => Float64Array.from(gram, (row) => dot(row, vector));
  let basis = orthonormal(Array.from({ length: Math.min(10, items.length) }, () => Float64Array.from(items, random)));
  for (let turn = 0; turn < 80; turn++) basis = orthonormal(basis.map(times));
  const found = eigen(basis.map((one) => { const image = times(one); return basis.map((other) => dot(image, other)); }));
  return [0, 1, 2].map((n) => {
    const scores = new Float64Array(positions), { value = 0, vector = [] } = found[n] ?? {};
    if (value <= 1e-9 * (found[0]?.value ?? 0) || value <= 0) return scores;
    const axis = Float64Array.from(items, (_, i) => vector.reduce((sum, share, b) => sum + share * basis[b][i], 0));
    if (byPosition) axis.forEach((each, p) => { scores[p] = each * Math.sqrt(value); });
    else rows.forEach((row, c) => { for (let p = 0; p < positions; p++) scores[p] += axis[c] * row[p]; });
    const farthest = scores.reduce((most, each) => (Math.abs(each) > Math.abs(most) ? each : most), 0);
    return farthest < 0 ? scores.map((each) => -each) : scores;
  });
}

/** The maps { shape, data } one after another, as one: channel by channel. */
function joined(maps, channels, positions) {
  if (maps.length === 1) return maps[0].data;
  const all = new Float32Array(channels * positions);
  let from = 0;
  for (const { data } of maps) {
    const size = data.length / channels;
    for (let c = 0; c < channels; c++) all.set(data.subarray(c * size, (c + 1) * size), c * positions + from);
    from += size;
  }
  return all;
}

/** The components of all maps together as the colours of a canvas for each: red, green, blue, each from its least score
 * of all to its greatest. The maps have as many channels. */
export function paint(canvases, maps) {
  const [channels] = maps[0].shape, positions = maps.reduce((sum, { data }) => sum + data.length / channels, 0);
  const colours = principal(joined(maps, channels, positions), channels, positions).map((scores) => {
    const least = scores.reduce((a, b) => Math.min(a, b)), range = scores.reduce((a, b) => Math.max(a, b)) - least;
    return scores.map((each) => (range ? Math.round((255 * (each - least)) / range) : 128));
  });
  let from = 0;
  canvases.forEach((canvas, n) => {
    const [, height, width] = maps[n].shape;
    [canvas.width, canvas.height] = [width, height];
    const context = canvas.getContext("2d"), image = context.createImageData(width, height);
    for (let p = 0; p < width * height; p++) image.data.set([...colours.map((each) => each[from + p]), 255], 4 * p);
    context.putImageData(image, 0, 0);
    from += width * height;
  });
}
