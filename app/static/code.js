// The request of the page as code that a reader can run.

import { BASE, address, key } from "./api.js";
import { $, el, say } from "./dom.js";

const shell = (text) => (/^[\w./:@-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);
const url = BASE.href.replace(/\/$/, "");

const EXAMPLES = {
  curl: (query, name, locked) =>
    `curl -F image=@${shell(name)}${locked ? ' \\\n  -H "Authorization: Bearer $KEY"' : ""} \\\n  ${shell(address("predict", query).href)}`,
  Python: (query, name, locked) => `from pvt_client import Client

with Client(${JSON.stringify(url)}${locked ? ", api_key=KEY" : ""}) as client:
    prediction = client.predict(${JSON.stringify(name)}${query.model ? `, model=${JSON.stringify(query.model)}` : ""})
    print(prediction.best.label, prediction.best.score)`,
  CLI: (query, name, locked) =>
    `${locked ? "PVT_API_KEY=$KEY " : ""}pvt-serve predict --url ${shell(url)}${query.model ? ` --model ${shell(query.model)}` : ""} ${shell(name)}`,
  JavaScript: (query, name, locked) => `const body = new FormData();
body.append("image", file); // of <input type="file">
const response = await fetch(${JSON.stringify(address("predict", query).href)}, {
  method: "POST", body,${locked ? "\n  headers: { Authorization: `Bearer ${key}` }," : ""}
});
const answer = await response.json();
if (!response.ok) throw new Error(answer.detail);
console.log(answer.results[0].predictions[0]);`,
};
let language = "curl", last = [{}, "image.png"];

export function show(query, name = last[1]) {
  last = [query, name];
  $("code").textContent = EXAMPLES[language](query, name, Boolean(key.get()));
}

export function start() {
  const buttons = Object.keys(EXAMPLES).map((name) => {
    const button = el("button", { type: "button", "aria-pressed": String(name === language) }, name);
    button.addEventListener("click", () => {
      language = name;
      for (const each of buttons) each.setAttribute("aria-pressed", String(each === button));
      show(...last);
    });
    return button;
  });
  $("code-tabs").replaceChildren(...buttons);
  $("copy").addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText($("code").textContent);
      say("Copied");
      $("copy").textContent = "Copied";
    } catch { // only secure origins have a clipboard: let the reader copy
      getSelection().selectAllChildren($("code"));
      $("copy").textContent = "Selected";
    }
    setTimeout(() => { $("copy").textContent = "Copy"; }, 1500);
  });
  show(...last);
}
