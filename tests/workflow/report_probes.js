"use strict";
// What the tests ask of an open report: each probe returns a JSON value.

const text = (cell) => cell.innerText.trim() || cell.textContent.trim();  // a row of another page has no inner text
const rows = (id) => [...document.querySelectorAll(`#${id} tbody tr`)];
const channel = (v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);

const probes = {
  numbers() {
    const table = (id) => rows(id).map((row) => [...row.cells].map((cell) => [cell.dataset.v ?? null, text(cell)]));
    return {
      lines: table("headlines"), pairs: table("differences"), scores: table("all-scores"), memory: table("memory-table"),
    };
  },

  sorting() {
    const heads = document.getElementById("all-scores").tHead.rows[0].cells;
    const column = (index) => rows("all-scores").map(({ cells }) => cells[index].dataset.v ?? text(cells[index]));
    const click = (index) => heads[index].querySelector("button").click();
    click(4);
    const up = column(4), said = heads[4].getAttribute("aria-sort");
    click(4);
    const down = column(4), then = heads[4].getAttribute("aria-sort");
    click(6);
    const stderr = column(6);
    click(0);
    return { up, down, stderr, names: column(0), said, then, left: heads[4].getAttribute("aria-sort") };
  },

  filtering() {
    const tools = document.getElementById("all-scores").parentElement.previousElementSibling;
    const [previous, next] = tools.querySelectorAll(".pages button");
    const input = tools.querySelector("input");
    const visible = () => rows("all-scores").filter((row) => row.offsetParent).map((row) => row.textContent);
    const status = () => tools.querySelector(".status").textContent;
    const type = (words) => { input.value = words; input.dispatchEvent(new Event("input")); };
    const first = visible(), begin = status(), locked = previous.disabled;
    next.click();
    const second = visible();
    type("CAPITALS  fp32");
    const matching = visible();
    type("no such thing");
    const nothing = [visible().length, status()];
    type("");
    return {
      first, second, matching, nothing, begin, locked, again: visible().length, label: input.getAttribute("aria-label"),
    };
  },

  printed() {
    for (const { cssRules } of document.styleSheets) {
      for (const rule of cssRules) if (rule.media?.mediaText === "print") rule.media.mediaText = "screen";
    }
    const input = document.getElementById("all-scores").parentElement.previousElementSibling.querySelector("input");
    const count = () => rows("all-scores").filter((row) => getComputedStyle(row).display !== "none").length;
    const whole = count(), head = getComputedStyle(document.querySelector("#all-scores thead button")).display;
    input.value = "capitals";
    input.dispatchEvent(new Event("input"));
    return { whole, head, filtered: count() };
  },

  theme() {
    const button = document.getElementById("theme");
    const now = () => [getComputedStyle(document.body).backgroundColor, button.getAttribute("aria-label")];
    const before = now();
    button.click();
    return [before, now()];
  },

  legibility() {
    for (const box of document.querySelectorAll("details")) box.open = true;
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const rgba = (colour) => {
      canvas.clearRect(0, 0, 1, 1);
      canvas.fillStyle = colour;
      canvas.fillRect(0, 0, 1, 1);
      return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const behind = (element) => {
      for (let e = element; e; e = e.parentElement) {
        const colour = rgba(getComputedStyle(e).backgroundColor);
        if (colour[3] === 255) return colour;
      }
      return [255, 255, 255];
    };
    const poor = {};
    let seen = 0;
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      const words = walker.currentNode.textContent.trim(), element = walker.currentNode.parentElement;
      const shown = words && element.getClientRects().length;
      if (!shown || element.closest("script, style, .hidden, button:disabled")) continue;
      seen += 1;
      const style = getComputedStyle(element), figure = element.closest("svg");
      const a = luminance(rgba(figure ? style.fill : style.color));
      const b = luminance(behind(figure ? figure.parentElement : element));
      const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), size = parseFloat(style.fontSize);
      const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
      if (ratio < (large ? 3 : 4.5)) poor[`${element.tagName} ${words.slice(0, 40)}`] = ratio.toFixed(2);
    }
    return { seen, poor, width: innerWidth, wide: document.documentElement.scrollWidth - innerWidth };
  },

  structure() {
    const all = (selector) => [...document.querySelectorAll(selector)];
    return {
      levels: all("h1, h2, h3, h4").map((heading) => Number(heading.tagName[1])),
      sections: all("main > section").map((section) => section.id),
      uncaptioned: all("table").filter((table) => !table.caption?.textContent.trim()).length,
      unscoped: all("th:not([scope])").length,
      headless: all("table").filter((table) => !table.querySelector("tbody tr th[scope=row]")).map((table) => table.id),
      unnamed: all("svg").filter((svg) => svg.getAttribute("role") !== "img" || !svg.getAttribute("aria-label")).length,
      figures: all("svg").length,
      dead: all("a[href^='#']").filter((a) => !document.getElementById(a.hash.slice(1))).map((a) => a.hash),
      language: document.documentElement.lang,
    };
  },
};
