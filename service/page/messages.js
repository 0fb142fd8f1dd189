// @ts-check
/** What the page says to the user, and where. */

import { $, icon, make } from "./dom.js";

const SHOWN_MS = 7000;

/**
 * A note on the stage that goes away by itself.
 * @param {string} text @param {{bad?: boolean, action?: [string, () => void]}} [options]
 */
export function tell(text, { bad = false, action } = {}) {
  const note = make("div", { class: bad ? "message bad" : "message" }, make("span", {}, text));
  const remove = () => note.remove();
  if (action) {
    const [label, act] = action;
    note.append(make("button", { type: "button", class: "plain quiet", onclick: () => (remove(), act()) }, label));
  }
  note.append(
    make("button", { type: "button", class: "square small", "aria-label": "Close", onclick: remove }, icon("i-close")),
  );
  const shown = $("messages");
  shown.append(note);
  while (shown.children.length > 3) shown.firstElementChild.remove();
  if (!bad) setTimeout(remove, SHOWN_MS);
}

/**
 * Say what is wrong beside the field it is about, and go there.
 * @param {ParentNode} within @param {string} field @param {string} text @returns {boolean} whether there is such a field
 */
export function showFieldError(within, field, text) {
  const row = [...within.querySelectorAll("[data-field]")].find(
    (each) => /** @type {HTMLElement} */ (each).dataset.field === field,
  );
  if (!row || /** @type {HTMLElement} */ (row).classList.contains("stage")) return false;
  const id = `error-${field}`;
  row.querySelector(".error")?.remove();
  row.append(make("p", { class: "error", id, role: "alert" }, text));
  row.closest("details")?.setAttribute("open", "");
  const control = /** @type {HTMLElement | null} */ (row.querySelector("input, textarea, select"));
  if (!control) return true;
  control.setAttribute("aria-invalid", "true");
  const described = control.getAttribute("aria-describedby")?.split(" ") ?? [];
  control.setAttribute("aria-describedby", [...described.filter((each) => each !== id), id].join(" "));
  control.focus();
  row.scrollIntoView({ block: "nearest" });
  return true;
}

/** @param {ParentNode} within */
export function clearErrors(within) {
  within.querySelectorAll(".error").forEach((each) => {
    const control = each.parentElement?.querySelector("[aria-invalid]");
    control?.removeAttribute("aria-invalid");
    const others = control?.getAttribute("aria-describedby")?.split(" ").filter((id) => id !== each.id) ?? [];
    if (others.length) control?.setAttribute("aria-describedby", others.join(" "));
    else control?.removeAttribute("aria-describedby");
    each.remove();
  });
}

/** Show a text in a paragraph, or hide it. @param {HTMLElement} place @param {string} text */
export function setText(place, text) {
  place.textContent = text;
  place.hidden = !text;
}
