// A drawing pad whose image is what models of handwritten digits were trained on: the ink cut to its own rectangle,
// white on black, 32 x 32, counted in blocks of 4 x 4 (as the UCI digits were made), enlarged to 64 x 64.

const GRID = 8, BLOCK = 4, FINE = 32, SIDE = 64;
const PEN = 4.2; // of FINE pixels, about one block

function trace(context, strokes, place, width) {
  context.lineWidth = width;
  context.lineCap = context.lineJoin = "round";
  context.strokeStyle = "#fff";
  for (const stroke of strokes) {
    context.beginPath();
    stroke.forEach((point, n) => {
      const [x, y] = place(point);
      if (n === 0) context.moveTo(x, y);
      context.lineTo(x, y);
    });
    context.stroke();
  }
}

/** The image of `strokes`, lists of [x, y], as a canvas of 64 x 64. */
export function render(strokes) {
  const points = strokes.flat();
  const xs = points.map(([x]) => x), ys = points.map(([, y]) => y);
  const left = Math.min(...xs), top = Math.min(...ys);
  const width = Math.max(...xs) - left, height = Math.max(...ys) - top;
  const scale = (FINE - PEN) / Math.max(width, height, 1);
  const place = ([x, y]) => [
    FINE / 2 + (x - left - width / 2) * scale,
    FINE / 2 + (y - top - height / 2) * scale,
  ];
  const context = new OffscreenCanvas(FINE, FINE).getContext("2d", { willReadFrequently: true });
  context.fillRect(0, 0, FINE, FINE);
  trace(context, strokes, place, PEN);
  const ink = context.getImageData(0, 0, FINE, FINE).data;
  const small = new OffscreenCanvas(GRID, GRID).getContext("2d");
  const grey = small.createImageData(GRID, GRID);
  for (let y = 0; y < GRID; y++) for (let x = 0; x < GRID; x++) {
    let sum = 0;
    for (let v = 0; v < BLOCK; v++) for (let u = 0; u < BLOCK; u++) sum += ink[4 * ((y * BLOCK + v) * FINE + x * BLOCK + u)];
    grey.data.set([...Array(3).fill(sum / BLOCK ** 2), 255], 4 * (y * GRID + x));
  }
  small.putImageData(grey, 0, 0);
  const large = new OffscreenCanvas(SIDE, SIDE);
  const enlarged = large.getContext("2d");
  enlarged.imageSmoothingQuality = "high";
  enlarged.drawImage(small.canvas, 0, 0, SIDE, SIDE);
  return large;
}

/** Strokes on `canvas`; `changed` is called with the strokes whenever there is more ink. */
export class Pad {
  constructor(canvas, changed) {
    this.canvas = canvas;
    this.strokes = [];
    let frame = 0;
    const report = () => { frame ||= requestAnimationFrame(() => { frame = 0; if (this.strokes.length) changed(this.strokes); }); };
    const point = (event) => {
      const box = canvas.getBoundingClientRect();
      return [(event.clientX - box.left) * canvas.width / box.width, (event.clientY - box.top) * canvas.height / box.height];
    };
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button > 0) return;
      canvas.setPointerCapture(event.pointerId);
      this.strokes.push([point(event)]);
      this.#paint();
      report();
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!canvas.hasPointerCapture(event.pointerId)) return;
      for (const each of event.getCoalescedEvents?.() ?? [event]) this.strokes.at(-1).push(point(each));
      this.#paint();
      report();
    });
    canvas.addEventListener("pointerup", report);
  }

  clear() {
    this.strokes = [];
    this.#paint();
  }

  #paint() {
    const context = this.canvas.getContext("2d");
    context.fillRect(0, 0, this.canvas.width, this.canvas.height);
    trace(context, this.strokes, (point) => point, this.canvas.width / 14);
  }
}
