// The settings: what the model recommends, and over it what the user has changed, which the browser keeps.

/**
 * @typedef {object} Settings
 * @property {import("./sampling.js").SamplingOptions} sampling
 * @property {number} maxTokens
 * @property {string} system
 * @property {import("./worker.js").EngineChoice} engine
 * @property {number} threads
 */

const KEPT = "fbiedge.settings";
const NOT_SAMPLING = ["system", "engine", "threads"];
/** What can't be computed with, beyond the bounds that the fields say. */
const TOO_SMALL = 1e-30;

/** The dialog and what it holds. */
export class SettingsView {
  /**
   * @param {HTMLDialogElement} dialog
   * @param {(changed: string) => void} onChange  told the name of the field
   */
  constructor(dialog, onChange) {
    this.dialog = dialog;
    this.form = /** @type {HTMLFormElement} */ (dialog.querySelector("form"));
    /** @type {Record<string, number | string>} */
    this.defaults = { temperature: 0, top_k: 0, top_p: 1, min_p: 0, repetition_penalty: 1, maxTokens: 0, system: "", engine: "auto", threads: 0 };
    /** @type {Record<string, number | string>} */
    this.changed = Object.fromEntries(Object.entries(readKept()).filter(([name]) => Object.hasOwn(this.defaults, name)));
    this.form.addEventListener("change", ({ target }) => {
      const field = /** @type {HTMLInputElement} */ (target);
      if (this.#take(field)) onChange(field.name);
    });
    // Enter in a field is no wish to leave the dialog.
    this.form.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && event.target instanceof HTMLInputElement) event.preventDefault();
    });
    dialog.addEventListener("close", () => this.#show());
    dialog.addEventListener("click", (event) => {
      if (event.target === dialog) dialog.close(); // beside it
    });
    dialog.querySelector("#recommended")?.addEventListener("click", () => {
      for (const name of Object.keys(this.defaults)) if (!NOT_SAMPLING.includes(name)) delete this.changed[name];
      this.#keep();
      this.#show();
    });
  }

  /** @returns {Settings} */
  get values() {
    const { maxTokens, system, engine, threads, ...sampling } = { ...this.defaults, ...this.changed };
    return /** @type {any} */ ({ sampling, maxTokens, system, engine, threads });
  }

  /** @param {import("./sampling.js").SamplingOptions} sampling */
  setRecommended(sampling) {
    Object.assign(this.defaults, sampling);
    this.#show();
  }

  /** @param {boolean} taken */
  setTakesSystem(taken) {
    /** @type {HTMLElement} */ (this.form.querySelector("#system-settings")).hidden = !taken;
  }

  open() {
    this.#show();
    this.dialog.showModal();
  }

  #show() {
    for (const [name, value] of Object.entries({ ...this.defaults, ...this.changed })) {
      const field = this.#field(name);
      field.value = String(value);
      field.removeAttribute("aria-invalid");
      field.closest("label")?.querySelector("small")?.removeAttribute("data-wrong");
    }
  }

  /**
   * Take a field's value over, unless it can't be used.
   * @param {HTMLInputElement} field
   */
  #take(field) {
    const number = field.valueAsNumber;
    const usable = field.type !== "number" || (field.validity.valid && field.value !== "" && (number === 0 || number >= TOO_SMALL));
    field.setAttribute("aria-invalid", String(!usable));
    const hint = /** @type {HTMLElement} */ (field.closest("label")?.querySelector("small"));
    hint.dataset.wrong = usable ? "" : `expected ${field.step === "1" ? "a whole number" : "a number"} from ${field.min} to ${field.max}`;
    if (!usable) return false;
    this.changed[field.name] = field.type === "number" ? number : field.value;
    if (this.changed[field.name] === this.defaults[field.name]) delete this.changed[field.name];
    this.#keep();
    return true;
  }

  #keep() {
    try {
      localStorage.setItem(KEPT, JSON.stringify(this.changed));
    } catch {
      // A browser that keeps nothing asks again next time.
    }
  }

  /** @param {string} name */
  #field(name) {
    return /** @type {HTMLInputElement} */ (this.form.elements.namedItem(name));
  }
}

/** @returns {Record<string, number | string>} */
function readKept() {
  try {
    const kept = JSON.parse(localStorage.getItem(KEPT) ?? "{}");
    return typeof kept === "object" && kept !== null ? kept : {};
  } catch {
    return {};
  }
}
