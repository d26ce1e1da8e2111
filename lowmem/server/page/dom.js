/** Elements, icons and what is said to screen readers. Text goes in as text: nothing here parses HTML. */

const SVG = "http://www.w3.org/2000/svg";

/**
 * An element. `properties`: `class`, `text`, `icon` (see `icon`), `on` (listeners by event), `data`; any other
 * name is an attribute, left out when its value is false, null or undefined, and empty when it is true.
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
 * A drawing from the page's own symbols; it has no name, what it stands in has.
 * @param {string} name of a symbol, without its "icon-"
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
 * A button that shows an icon, and whose name is also its tooltip.
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
 * The page's element with this id.
 * @param {string} id
 * @returns {any}
 */
export function byId(id) {
  return document.getElementById(id);
}

/**
 * Into the clipboard; false where the browser refuses.
 * @param {string} text
 */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Away from this machine the page comes without encryption, and browsers then offer the old way alone.
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
 * A button that copies, and says for a moment that it has.
 * @param {() => string} text
 * @param {string} label
 * @param {boolean} [worded] show "Copy" beside the icon
 */
export function copyButton(text, label, worded = false) {
  const button = iconButton("copy", label, async () => {
    const copied = await copyText(text());
    announce(copied ? "Copied" : "The browser did not allow copying");
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
 * Say something to who cannot see it, when they have a moment.
 * @param {string} text
 */
export function announce(text) {
  const log = byId("announcements");
  log.append(element("p", { text }));
  while (log.children.length > 6) log.firstElementChild.remove();
}

let noticeTimer = 0;

/**
 * A short message at the foot of the page, with at most one thing to do about it.
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

/** Whether the page is used with fingers, and a keyboard that comes up when it is needed. */
export function isTouched() {
  return matchMedia("(pointer: coarse)").matches;
}

/**
 * A number of bytes as people read it: 1.5 GiB.
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
