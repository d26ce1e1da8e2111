/** Elements, icons and messages for screen readers. All text is inserted as text; no HTML is parsed. */

const SVG = "http://www.w3.org/2000/svg";

/**
 * Create an element. `properties`: `class`, `text`, `icon` (see `icon`), `on` (listeners by event), `data`; every other
 * name is an attribute, omitted if its value is false, null or undefined, and empty if it is true.
 * @param {string} tag
 * @param {Record<string, any>} [properties]
 * @param {...(Node|string|null|undefined|false)} children
 * @returns {any}
 */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === false || value === null || value === undefined) continue;
    if (name === "class") made.className = value;
    else if (name === "text") made.textContent = value;
    else if (name === "icon") made.append(icon(value));
    else if (name === "data") Object.assign(made.dataset, value);
    else if (name === "on") {
      for (const [event, listener] of Object.entries(value)) made.addEventListener(event, listener);
    } else made.setAttribute(name, value === true ? "" : String(value));
  }
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

/**
 * An icon from the page's symbols. It is hidden from screen readers; its parent needs a label.
 * @param {string} name of the symbol, without "icon-"
 */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/**
 * A button with an icon; the label is also its tooltip.
 * @param {string} name icon
 * @param {string} label
 * @param {(event: Event) => void} act
 * @param {string} [kind] more classes
 * @returns {HTMLButtonElement}
 */
export function iconButton(name, label, act, kind = "") {
  return element("button", {
    type: "button", class: `icon-button ${kind}`.trim(), "aria-label": label, title: label, icon: name,
    on: { click: act },
  });
}

/**
 * The element with this id.
 * @param {string} id
 * @returns {any}
 */
export function byId(id) {
  return document.getElementById(id);
}

/**
 * Copy to the clipboard; resolves to false if the browser refuses.
 * @param {string} text
 */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Without HTTPS, browsers offer only the old command for pages of other hosts.
    const area = element("textarea", { class: "visually-hidden", readonly: true });
    area.value = text;
    const focused = /** @type {HTMLElement|null} */ (document.activeElement);
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    focused?.focus();
    return copied;
  }
}

/**
 * A button that copies a text and confirms it briefly.
 * @param {() => string} text
 * @param {string} label
 * @param {boolean} [worded] show "Copy" beside the icon
 */
export function copyButton(text, label, worded = false) {
  const button = iconButton("copy", label, async () => {
    const copied = await copyText(text());
    announce(copied ? "Copied" : "The browser refused to copy");
    if (!copied) return;
    show("check", "Copied");
    clearTimeout(timer);
    timer = setTimeout(() => show("copy", "Copy"), 1600);
  });
  const word = worded ? element("span", { class: "word", text: "Copy" }) : null;
  if (word) button.append(word);
  let timer = 0;
  /** @param {string} name @param {string} text */
  function show(name, text) {
    button.querySelector("use")?.setAttribute("href", `#icon-${name}`);
    button.classList.toggle("is-done", name === "check");
    if (word) word.textContent = text;
  }
  return button;
}

/**
 * Announce a text to screen readers, politely.
 * @param {string} text
 */
export function announce(text) {
  const log = byId("announcements");
  log.append(element("p", { text }));
  while (log.children.length > 6) log.firstElementChild.remove();
}

let noticeTimer = 0;

/**
 * Show a short message at the bottom of the page, with at most one action.
 * @param {string} text
 * @param {{label: string, act: () => void}} [action]
 */
export function notify(text, action) {
  const place = byId("notice");
  const close = () => place.replaceChildren();
  place.replaceChildren(
    element(
      "div",
      { class: "notice" },
      element("span", { text }),
      action && element("button", {
        type: "button", class: "text-button", text: action.label,
        on: { click: () => { close(); action.act(); } },
      }),
      iconButton("close", "Dismiss", close),
    ),
  );
  clearTimeout(noticeTimer);
  const later = () => {
    noticeTimer = setTimeout(() => (place.matches(":hover, :focus-within") ? later() : close()), 10_000);
  };
  later();
}

/** Whether the device has a touch screen and an on-screen keyboard. */
export function isTouched() {
  return matchMedia("(pointer: coarse)").matches;
}

/**
 * Format a number of bytes, such as 1.5 GiB.
 * @param {number} bytes
 */
export function formatBytes(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (bytes >= 1024 && unit < units.length - 1) {
    bytes /= 1024;
    unit += 1;
  }
  const digits = unit < 3 ? 0 : bytes < 10 ? 2 : 1;
  return `${bytes.toFixed(digits)} ${units[unit]}`;
}
