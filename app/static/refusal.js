// What the service refuses, in its own words. What it refuses for now is sent again when it says so.

import { Problem } from "./api.js";
import { el, say } from "./dom.js";

export class Refusal {
  #timer = 0;

  /** Shows problems in the element `target`. */
  constructor(target) { this.target = target; }

  /** Show `error`; `again` is called when its Retry-After is over, or by a button. Without, nothing is sent again. */
  show(error, again = null) {
    this.stop();
    const problem = error instanceof Problem ? error : new Problem("The page failed", String(error), -1);
    const next = el("p");
    this.target.className = problem.status === 503 && problem.retryAfter !== null ? "problem waits" : "problem";
    this.target.hidden = false;
    this.target.replaceChildren(
      el("strong", {}, problem.status > 0 ? `${problem.title} (${problem.status})` : problem.title),
      el("p", {}, problem.detail), next,
      ...(problem.requestId ? [el("p", { class: "hint" }, "Request ", el("code", {}, problem.requestId))] : []),
    );
    say(`${problem.title}. ${problem.detail}`);
    if (again && problem.status === 0) next.textContent = "It is sent again when the service is back.";
    if (again && problem.retryAfter !== null) this.#countDown(problem.retryAfter, next, again);
  }

  #countDown(seconds, line, again) {
    const button = el("button", { type: "button" }, "Send now"), text = el("span");
    line.replaceChildren(text, " ", button);
    const until = performance.now() + 1000 * seconds;
    const tick = () => {
      const left = Math.ceil((until - performance.now()) / 1000);
      text.textContent = `Sends it again in ${Math.max(left, 0)} s.`;
      if (left > 0) return;
      this.stop();
      again({ quiet: true });
    };
    button.addEventListener("click", () => { this.stop(); again(); });
    this.#timer = setInterval(tick, 250);
    tick();
  }

  /** Send nothing again. */
  stop() { clearInterval(this.#timer); }

  clear() {
    this.stop();
    this.target.hidden = true;
  }
}
