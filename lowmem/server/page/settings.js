/** Settings of requests, and the theme. */

import { byId } from "./dom.js";
import { readValue, writeValue } from "./store.js";

/**
 * @typedef {{
 *   system: string, temperature: number, top_p: number, max_tokens: number, seed: number|null, stop: string[]
 * }} Settings seed: null draws a new one for each request
 */

/** @type {Settings & Record<string, any>} those of StarChat Alpha's model card, with longer answers */
export const DEFAULTS = { system: "", temperature: 0.2, top_p: 0.95, max_tokens: 1024, seed: null, stop: [] };
const MOST_STOPS = 4; // the limit of OpenAI's API

/** @typedef {{least: number, most: number, whole: boolean}} Limits */
/** @type {Record<string, Limits>} */
const NUMBERS = {
  temperature: { least: 0, most: 2, whole: false },
  top_p: { least: 0.01, most: 1, whole: false },
  max_tokens: { least: 1, most: 1_000_000, whole: true },
  seed: { least: 0, most: Number.MAX_SAFE_INTEGER, whole: true },
};

export class SettingsDialog {
  /** @param {() => void} onTheme called when the theme has changed */
  constructor(onTheme) {
    this.dialog = byId("settings");
    this.form = byId("settings-form");
    this.onTheme = onTheme;
    /** @type {Settings & Record<string, any>} */
    this.settings = readSettings();
    this.#fill();
    this.form.addEventListener("input", () => this.#take());
    this.form.addEventListener("submit", (/** @type {Event} */ event) => {
      event.preventDefault();
      if (this.#take()) this.dialog.close();
    });
    byId("reset-settings").addEventListener("click", () => {
      this.settings = { ...DEFAULTS };
      writeValue("settings", undefined);
      this.#fill();
      byId("settings-said").textContent = "All settings have been reset.";
    });
    this.dialog.addEventListener("close", () => this.#fill()); // invalid values are not saved
    for (const choice of this.form.elements.theme) {
      choice.addEventListener("change", () => setTheme(choice.value, this.onTheme));
    }
  }

  open() {
    byId("settings-said").textContent = "";
    this.#fill();
    this.dialog.showModal();
  }

  #fill() {
    const { elements } = this.form;
    elements.system.value = this.settings.system;
    for (const name of Object.keys(NUMBERS)) elements[name].value = this.settings[name] ?? "";
    elements.stop.value = this.settings.stop.map(escapeStop).join("\n");
    elements.theme.value = currentTheme();
    for (const name of [...Object.keys(NUMBERS), "stop"]) this.#complain(name, "");
  }

  /** Save the valid values; returns false if some are invalid, which then keep their old values. */
  #take() {
    const { elements } = this.form;
    byId("settings-said").textContent = "";
    let good = true;
    this.settings.system = elements.system.value;
    for (const [name, limits] of Object.entries(NUMBERS)) {
      const text = elements[name].value.trim();
      const given = text || elements[name].validity.badInput; // an invalid number field has no text
      const value = given ? Number(text || Number.NaN) : DEFAULTS[name];
      const wrong = value !== null && !isWithin(value, limits);
      this.#complain(name, wrong ? limitsText(limits) : "");
      if (!wrong) this.settings[name] = value;
      good &&= !wrong;
    }
    const stops = elements.stop.value.split("\n").filter(Boolean).map(unescapeStop);
    this.#complain("stop", stops.length > MOST_STOPS ? `Use at most ${MOST_STOPS}.` : "");
    if (stops.length <= MOST_STOPS) this.settings.stop = stops;
    writeValue("settings", this.settings);
    return good && stops.length <= MOST_STOPS;
  }

  /** @param {string} name @param {string} words "" for a valid value */
  #complain(name, words) {
    const field = this.form.elements[name];
    if (words) field.setAttribute("aria-invalid", "true");
    else field.removeAttribute("aria-invalid");
    byId(`${name}-wrong`).textContent = words;
  }
}

/**
 * The fields of a request that the settings determine.
 * @param {Settings} settings
 */
export function requestSettings({ temperature, top_p, max_tokens, seed, stop }) {
  return {
    temperature, top_p, max_tokens, ...(seed === null ? {} : { seed }), ...(stop.length ? { stop } : {}),
  };
}

/** @returns {Settings & Record<string, any>} the saved settings that are still valid */
function readSettings() {
  const kept = readValue("settings");
  const settings = { ...DEFAULTS };
  if (typeof kept !== "object" || kept === null) return settings;
  if (typeof kept.system === "string") settings.system = kept.system;
  for (const [name, limits] of Object.entries(NUMBERS)) {
    if (isWithin(kept[name], limits)) settings[name] = kept[name];
  }
  if (Array.isArray(kept.stop)) {
    const texts = kept.stop.filter((/** @type {any} */ text) => typeof text === "string" && text);
    settings.stop = texts.slice(0, MOST_STOPS);
  }
  return settings;
}

/** @param {any} value @param {Limits} limits */
function isWithin(value, { least, most, whole }) {
  return typeof value === "number" && value >= least && value <= most && (!whole || Number.isInteger(value));
}

/** @param {Limits} limits */
function limitsText({ least, most, whole }) {
  const kind = whole ? "A whole number" : "A number";
  return most > 100 ? `${kind}, ${least} or more.` : `${kind} from ${least} to ${most}.`;
}

/** @param {string} text with \n and \t escaped, for the field */
function unescapeStop(text) {
  return text.replace(/\\(n|t|\\)/g, (_, letter) => (letter === "n" ? "\n" : letter === "t" ? "\t" : letter));
}

/** @param {string} text */
function escapeStop(text) {
  return text.replaceAll("\\", "\\\\").replaceAll("\n", "\\n").replaceAll("\t", "\\t");
}

/** @returns {"system"|"light"|"dark"} */
function currentTheme() {
  const { theme } = document.documentElement.dataset;
  return theme === "light" || theme === "dark" ? theme : "system";
}

/** Whether the dark theme is active. */
export function isDark() {
  const theme = currentTheme();
  return theme === "system" ? matchMedia("(prefers-color-scheme: dark)").matches : theme === "dark";
}

/** @param {string} theme "system", "light" or "dark" @param {() => void} [onTheme] */
export function setTheme(theme, onTheme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  writeValue("theme", theme === "system" ? undefined : theme);
  onTheme?.();
}
