// The last five minutes, from the stream of stats: one event each second, none while the page is hidden.

import { address, json, reached } from "./api.js";
import { $, el, megabytes, ms, table } from "./dom.js";

const SECONDS = 300, LEAST_SECONDS = 60, WIDTH = 300, HEIGHT = 90;
const sum = (list, of) => list.reduce((total, each) => total + of(each), 0);
const most = (list) => Math.max(0, ...list);
const count = (value) => value.toLocaleString("en", { maximumFractionDigits: value < 1 ? 2 : value < 10 ? 1 : 0 });
const endpoints = (stats) => stats.routes.filter(({ route }) => route !== "/" && !route.startsWith("/static")); // not the page's files
const busiest = (stats) => endpoints(stats)[0];
const CHARTS = [
  ["Requests a second", count, { requests: (s) => sum(endpoints(s), (r) => r.per_second) }],
  ["Errors in the last minute", count, {
    client: (s) => sum(s.routes, (r) => r.client_errors), refused: (s) => sum(s.routes, (r) => r.refused),
    server: (s) => sum(s.routes, (r) => r.server_errors), abandoned: (s) => sum(s.routes, (r) => r.abandoned),
  }],
  ["Latency of the busiest endpoint", ms, { p50: (s) => busiest(s)?.p50_ms ?? 0, p99: (s) => busiest(s)?.p99_ms ?? 0 }],
  ["Images in the queues", count, {
    "waiting to decode": (s) => sum(s.queues, (q) => q.waiting_decode), decoding: (s) => sum(s.queues, (q) => q.decoding),
    queued: (s) => sum(s.queues, (q) => q.queued), running: (s) => sum(s.queues, (q) => q.running),
  }],
  ["Busy instances", count, { busy: (s) => s.instances.busy, of: (s) => s.instances.total }],
  ["Memory", megabytes, { resident: (s) => s.memory.resident_bytes, models: (s) => sum(Object.values(s.memory.models_bytes), Number) }],
];
const SVG = "http://www.w3.org/2000/svg";
let history = []; // of { at, values by chart and series }
let source = null;
let wait = 1; // seconds until the next attempt

function shape(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

/** The seconds that the charts span: those that were seen. */
const span = () => Math.min(SECONDS, Math.max(LEAST_SECONDS, history.at(-1).at - history[0].at));

/** A line through what was seen, with gaps where nothing was. */
function path(points, top, now, seconds) {
  let drawn = "", before = -Infinity;
  for (const [at, value] of points) {
    const x = WIDTH * (1 - (now - at) / seconds), y = HEIGHT - 2 - ((HEIGHT - 6) * value) / (top || 1);
    drawn += `${at - before > 3 ? "M" : "L"}${x.toFixed(1)} ${y.toFixed(1)}`;
    before = at;
  }
  return drawn;
}

function draw() {
  if ($("live").hidden || !history.length) return;
  const now = history.at(-1).at, seconds = span();
  $("live-span").textContent = seconds === SECONDS ? "the last five minutes" : seconds === LEAST_SECONDS ? "the last minute" : `the last ${Math.round(seconds)} s`;
  CHARTS.forEach(([title, format, series], n) => {
    const names = Object.keys(series), figure = $("charts").children[n];
    const top = most(history.flatMap((each) => each.values[n]));
    const svg = figure.querySelector("svg");
    svg.setAttribute("aria-label", `${title}; ${names.map((name, i) => `${name} ${format(history.at(-1).values[n][i])}`).join(", ")}`);
    names.forEach((name, i) => {
      svg.querySelector(`.s${i + 1}`).setAttribute("d", path(history.map((each) => [each.at, each.values[n][i]]), top, now, seconds));
      figure.querySelectorAll("li")[i].lastChild.textContent = ` ${name} ${format(history.at(-1).values[n][i])}`;
    });
    figure.querySelector(".top").textContent = `up to ${format(top)}`;
  });
}

function tables(stats) {
  if ($("live").hidden) return;
  table($("routes"), ["Route", ["per s", true], ["p50", true], ["p99", true], ["4xx", true], ["429, 503", true], ["5xx", true], ["499", true]],
    endpoints(stats).map((r) => [r.route, [count(r.per_second), true], [ms(r.p50_ms), true], [ms(r.p99_ms), true],
      [r.client_errors, true], [r.refused, true], [r.server_errors, true], [r.abandoned, true]]));
  table($("batches"), ["Model", ["images", true], "released", ["waited", true], ["ran", true]],
    stats.batches.last.slice(0, 10).map((b) => [b.model, [b.size, true], b.reason, [ms(b.wait_ms), true], [b.run_ms === null ? "runs" : ms(b.run_ms), true]]));
}

function seen(stats) {
  wait = 1;
  reached(true);
  history.push({ at: stats.at, values: CHARTS.map(([, , series]) => Object.values(series).map((value) => value(stats))) });
  history = history.filter((each) => stats.at - each.at <= SECONDS);
  const mean = stats.batches.mean_size, hours = stats.uptime_seconds / 3600;
  $("live-state").textContent = `up ${hours >= 1 ? `${hours.toFixed(1)} h` : `${Math.floor(stats.uptime_seconds / 60)} min`}`
    + ` · ${stats.workers} ${stats.workers === 1 ? "worker" : "workers"} · ${stats.in_flight} under way`
    + ` · ${mean ? `mean batch ${mean}` : "no batch in the last minute"}`;
  $("version").textContent = `pvt-serve ${stats.version} ·`;
  draw();
  tables(stats);
}

function open() {
  if (source || document.hidden) return;
  source = new EventSource(address("stats/stream"));
  source.addEventListener("message", (event) => seen(JSON.parse(event.data)));
  source.addEventListener("error", close);
}

async function close() {
  source?.close();
  source = null;
  const seconds = wait;
  wait = Math.min(30, wait * 2);
  try {
    seen(await json("stats")); // whether it is gone, or has as many streams as it serves
    wait = Math.min(30, seconds * 2);
  } catch { /* the banner says so */ }
  banner(seconds);
  setTimeout(open, 1000 * seconds);
}

let counting = 0;

function banner(seconds) {
  clearInterval(counting);
  if ($("banner").hidden) return;
  let left = seconds;
  const tick = () => {
    if (left >= 0) $("seconds").textContent = `Trying again ${left ? `in ${left} s` : "now"}.`;
    left -= 1;
  };
  tick();
  counting = setInterval(tick, 1000);
}

/** The service is gone, or back. */
export function gone(is) {
  clearInterval(counting);
  $("banner").hidden = !is;
  // One announcement; the seconds are not read out.
  $("banner").replaceChildren(...(is ? ["The service does not answer. ", el("span", { id: "seconds", "aria-hidden": "true" })] : []));
  if (is && source) close();
}

export function start() {
  $("charts").replaceChildren(...CHARTS.map(([title, , series]) => {
    const svg = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": title });
    svg.append(shape("line", { x1: 0, x2: WIDTH, y1: HEIGHT - 1, y2: HEIGHT - 1 }),
      ...Object.keys(series).map((_, i) => shape("path", { class: `s${i + 1}` })));
    return el("figure", {}, el("figcaption", {}, title, el("span", { class: "top hint" })), svg,
      el("ul", { class: "legend" }, ...Object.keys(series).map((name, i) => el("li", {}, el("i", { class: `s${i + 1}` }), ` ${name}`))));
  }));
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) open();
    else { source?.close(); source = null; }
  });
  open();
}

export function shown() {
  draw();
}
