// The service: its address, the key, requests, problems.

export const BASE = new URL("../", import.meta.url); // the page may lie below any prefix
const KEY = "pvt-serve-key";

export const key = {
  get: () => sessionStorage.getItem(KEY) || "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** What went wrong: a problem of the service (RFC 9457), or, with status 0, that it does not answer. */
export class Problem extends Error {
  constructor(title, detail, status, retryAfter = null, requestId = "") {
    super(detail);
    Object.assign(this, { title, detail, status, retryAfter, requestId });
  }
}

/** Listeners of "gone" and "back": whether the service answers. */
export const reach = new EventTarget();
let gone = false;

export function reached(answers) {
  if (answers === !gone) return;
  gone = !answers;
  reach.dispatchEvent(new Event(gone ? "gone" : "back"));
}

export function address(path, query = {}) {
  const url = new URL(path, BASE);
  for (const [name, value] of Object.entries(query)) if (value !== undefined && value !== "") url.searchParams.set(name, value);
  return url;
}

const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (each) => each.toString(16).padStart(2, "0")).join("");

/** The response; throws a Problem, or an AbortError. */
export async function call(path, { query, headers = {}, bearer = key.get(), ...options } = {}) {
  headers = { ...headers, "X-Request-ID": newId() }; // no page of another site can send one unasked
  if (bearer) headers = { ...headers, Authorization: `Bearer ${bearer}` };
  let response;
  try {
    response = await fetch(address(path, query), { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (error instanceof TypeError && /header|ByteString/i.test(error.message)) {
      throw new Problem("The key can't be sent", "It has characters that no header carries.", 401);
    }
    reached(false);
    throw new Problem("The service does not answer", "The request got no answer.", 0);
  }
  reached(true);
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  const wait = parseInt(response.headers.get("Retry-After"), 10);
  throw new Problem(
    body.title || `Status ${response.status}`,
    body.detail || response.statusText,
    response.status,
    Number.isNaN(wait) ? null : wait,
    response.headers.get("X-Request-ID") || "",
  );
}

export const json = async (path, options) => (await call(path, options)).json();

/** A form as the service reads it: each image in the field `image`. */
export function form(images) {
  const data = new FormData();
  for (const { blob, name } of images) data.append("image", blob, name);
  return data;
}

/** Server-Timing as [name, milliseconds]. */
export function timing(response) {
  return (response.headers.get("Server-Timing") || "").split(",").flatMap((part) => {
    const match = /^\s*(\w+);dur=([\d.]+)/.exec(part);
    return match ? [[match[1], Number(match[2])]] : [];
  });
}
