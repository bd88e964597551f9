// Elements. Text from the service or a file becomes text only, never markup.

export const $ = (id) => document.getElementById(id);

/** An element with properties and children; children that are no elements become text. */
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") element.className = value;
    else if (name.includes("-")) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((each) => each !== null && each !== undefined));
  return element;
}

export const say = (text) => { $("live-region").textContent = text; };

export function table(target, head, rows) {
  const cell = (tag, value) => {
    const [text, numeric] = Array.isArray(value) ? value : [value, false];
    return el(tag, { class: numeric ? "n" : "", ...(tag === "th" ? { scope: "col" } : {}) }, text);
  };
  target.replaceChildren(
    el("thead", {}, el("tr", {}, ...head.map((each) => cell("th", each)))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((each) => cell("td", each))))),
  );
}

export const ms = (value) => `${value < 10 ? value.toFixed(1) : Math.round(value).toLocaleString("en")}\u00a0ms`;
export const megabytes = (bytes) => `${(bytes / 1e6).toLocaleString("en", { maximumFractionDigits: bytes < 1e7 ? 1 : 0 })} MB`;
export const score = (value, activation) => (activation === "none" ? value.toFixed(3) : `${(100 * value).toFixed(1)} %`);
