"use strict";
// A box and its text carry the same data-cell; whichever the pointer or the focus is on, both light up.
const light = (target, on) => {
  const cell = target instanceof Element && target.closest("[data-cell]");
  if (!cell) return;
  for (const one of cell.closest(".v_page").querySelectorAll(`[data-cell="${cell.dataset.cell}"]`)) {
    one.classList.toggle("v_on", on);
  }
};
for (const [event, on] of [["pointerover", true], ["focusin", true], ["pointerout", false], ["focusout", false]]) {
  document.addEventListener(event, ({ target }) => light(target, on));
}
// Browsers remember checkboxes over a reload, so what they say is applied once in the beginning.
const show = (choice) => {
  for (const one of document.querySelectorAll(".v_box, .v_cell")) {
    if (one.dataset.category === choice.dataset.category) one.hidden = !choice.checked;
  }
};
for (const choice of document.querySelectorAll("fieldset input")) {
  choice.addEventListener("change", () => show(choice));
  if (!choice.checked) show(choice);
}
