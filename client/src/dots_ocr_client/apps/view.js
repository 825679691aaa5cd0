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
const named = (id) => document.getElementById(id);
const pages = [...document.querySelectorAll(".v_page")].map((page) => ({
  page, link: document.querySelector(`nav a[href="#${page.id}"]`), text: page.querySelector(".v_text"),
}));
// Each place of a search in a page's text; the browser marks them, so that nothing of the page is changed.
function* places(text, wanted) {
  const walker = document.createTreeWalker(text, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const said = node.data.toLowerCase();
    for (let at = said.indexOf(wanted); at >= 0; at = said.indexOf(wanted, at + wanted.length)) {
      const range = new Range();
      range.setStart(node, at);
      range.setEnd(node, Math.min(at + wanted.length, node.length));
      yield range;
    }
  }
}
const choose = () => {
  const wanted = named("v_search").value.trim().toLowerCase();
  const only = named("v_only").value;
  const found = [];
  let count = 0;
  for (const { page, link, text } of pages) {
    page.hidden = link.hidden = !text.textContent.toLowerCase().includes(wanted)
      || (only !== "" && !page.dataset.states.split(" ").includes(only));
    count += !page.hidden;
    if (wanted && !page.hidden) found.push(...places(text, wanted));
  }
  if (globalThis.Highlight) CSS.highlights.set("v_found", new Highlight(...found.slice(0, 10000)));
  named("v_count").value = wanted || only ? `${count} of ${pages.length} pages` : "";
};
const plain = () => document.body.classList.toggle("v_plain", !named("v_boxes").checked);
named("v_search").addEventListener("input", choose);
named("v_only").addEventListener("change", choose);
named("v_boxes").addEventListener("change", plain);
choose();
plain();
// What a link leads to must not end up under the bar, which is as high as its switches need.
const bar = document.querySelector(".v_bar");
new ResizeObserver(() => {
  document.documentElement.style.setProperty("--bar", `${bar.offsetHeight}px`);
  document.documentElement.style.scrollPaddingTop = `${bar.offsetHeight + 8}px`;
}).observe(bar);
