// One request at a time, and the newest answer wins.

export class Latest {
  #controller = null;
  #next = null;

  /** Run `job(signal)`. What runs is given up, unless `patient`: then it ends first, and of all that wait only the newest runs. */
  run(job, { patient = false } = {}) {
    this.#next = job;
    if (!this.#controller) return this.#go();
    if (!patient) this.#controller.abort();
    return undefined;
  }

  stop() {
    this.#next = null;
    this.#controller?.abort();
  }

  async #go() {
    while (this.#next) {
      const job = this.#next;
      this.#next = null;
      this.#controller = new AbortController();
      try {
        await job(this.#controller.signal);
      } catch (error) {
        if (error.name !== "AbortError") throw error;
      } finally {
        this.#controller = null;
      }
    }
  }
}
