// Keeps a page up to date: fetches it again when something has happened, and puts the parts that
// differ into place. Figures are drawn from the page's own JSON.
"use strict";

const SOON = 2000, LATER = 15000;
// The report's inks, which are for white paper, by the variables of pages.css.
const INKS = {
  "#1f2933": "--ink", "#66727f": "--faint", "#5b6672": "--faint", "#b8c0ca": "--axis", "#9aa5b1": "--axis",
  "#e6e9ee": "--grid", "#444444": "--grey", "#0b3d6e": "--link", "white": "--paper",
};
const CONFIG = {
  displaylogo: false, responsive: true, modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
};
const dark = matchMedia("(prefers-color-scheme: dark)");
const hidden = new Set();
let drawn = {};

function inked(value, style) {
  if (typeof value === "string") return value in INKS ? style.getPropertyValue(INKS[value]).trim() : value;
  if (Array.isArray(value)) return value.map((one) => inked(one, style));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, inked(one, style)]));
}

function figuresOf(page) {
  const element = page.getElementById("figures");
  return element ? JSON.parse(element.textContent) : {};
}

function draw(figures, anew) {
  const style = getComputedStyle(document.documentElement);
  for (const [id, figure] of Object.entries(figures)) {
    const text = JSON.stringify(figure), place = document.getElementById(id);
    if (!place || (!anew && drawn[id] === text)) continue;
    drawn[id] = text;
    const { data, layout } = inked(figure, style);
    for (const trace of data) if (hidden.has(trace.meta)) trace.visible = false;
    Plotly.react(place, data, layout, CONFIG);
  }
}

function replaced(old, fresh) {
  if (!old || !fresh || old.innerHTML === fresh.innerHTML) return;
  const focused = old.contains(document.activeElement) ? document.activeElement.id : "";
  const ticked = [...old.querySelectorAll("input:checked")].map((box) => box.id);
  const open = [...old.querySelectorAll("details[open] > summary")].map((summary) => summary.id);
  old.replaceChildren(...[...fresh.childNodes].map((node) => document.importNode(node, true)));
  for (const id of ticked) if (document.getElementById(id)) document.getElementById(id).checked = true;
  for (const id of open) document.getElementById(id)?.parentElement.setAttribute("open", "");
  if (focused) document.getElementById(focused)?.focus();
}

const placesOf = (page) => [...page.querySelectorAll("[data-figure]")].map((e) => e.id + e.style.cssText).join();

async function refresh() {
  const answer = await fetch(location.href);
  if (answer.redirected) return location.reload();  // the token is not good any more
  if (answer.status === 404) return location.assign("/searches");
  if (!answer.ok) return;
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const old of document.querySelectorAll("[data-live]")) replaced(old, page.getElementById(old.id));
  const panels = document.querySelector("[data-panels]");
  if (panels && placesOf(document) !== placesOf(page)) {
    for (const place of panels.querySelectorAll("[data-figure]")) Plotly.purge(place);
    panels.replaceChildren(...page.getElementById("panels").childNodes);
    drawn = {};
    for (const button of panels.querySelectorAll("[data-method]")) press(button);
  } else if (panels) {
    for (const note of panels.querySelectorAll(".panel > p")) {
      const fresh = page.getElementById(note.parentElement.getAttribute("aria-labelledby"));
      note.textContent = fresh.parentElement.querySelector("p").textContent;
    }
  }
  draw(figuresOf(page), false);
}

const press = (button) => button.setAttribute("aria-pressed", !hidden.has(button.dataset.method));

document.addEventListener("click", (click) => {
  const button = click.target.closest("[data-method]");
  if (!button) return;
  const method = button.dataset.method;
  if (!hidden.delete(method)) hidden.add(method);
  press(button);
  for (const place of document.querySelectorAll("[data-figure]")) {
    const traces = (place.data ?? []).flatMap((trace, i) => (trace.meta === method ? [i] : []));
    if (traces.length) Plotly.restyle(place, { visible: !hidden.has(method) }, traces);
  }
});

function watch() {
  let due = null;
  const soon = () => { due ??= setTimeout(async () => {
    try { await refresh(); } catch { /* the service is away: the next look may find it */ }
    due = null;
  }, SOON); };
  const stream = document.getElementById("stream")?.dataset.events;
  if (stream) {
    const source = new EventSource(stream);
    source.onmessage = soon;
    source.addEventListener("end", () => { source.close(); soon(); });
  }
  // States change without an event, too.
  if (stream || document.getElementById("searches")) setInterval(() => { if (!document.hidden) soon(); }, LATER);
}

watch();
draw(figuresOf(document), true);
dark.addEventListener("change", () => draw(figuresOf(document), true));
