"use strict";
// Tables that sort, filter and turn pages; a switch between light and dark; which section is being read.
(() => {
  const make = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };

  // --- light and dark: the system decides until the reader does
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");
  let chosen = null;
  try { chosen = localStorage.getItem("reproval-theme"); } catch { /* storage may be closed to files */ }
  const paint = () => {
    const dark = chosen ? chosen === "dark" : system.matches;
    root.dataset.theme = dark ? "dark" : "light";
    button.textContent = dark ? "Light" : "Dark";
    button.setAttribute("aria-label", dark ? "Switch to light colours" : "Switch to dark colours");
  };
  button.hidden = false;
  button.addEventListener("click", () => {
    chosen = root.dataset.theme === "dark" ? "light" : "dark";
    try { localStorage.setItem("reproval-theme", chosen); } catch { /* as above */ }
    paint();
  });
  system.addEventListener("change", paint);
  paint();

  // --- tables
  const compare = new Intl.Collator("en", { numeric: true }).compare;
  const value = (row, column) => {
    const cell = row.cells[column];
    if (cell.dataset.v === undefined) return cell.textContent.trim();
    return cell.dataset.v === "" || Number.isNaN(Number(cell.dataset.v)) ? null : Number(cell.dataset.v);
  };
  const order = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : compare(String(a), String(b)));

  for (const table of document.querySelectorAll("table.data")) {
    const body = table.tBodies[0];
    const all = [...body.rows];
    const size = Number(table.dataset.page) || Infinity;
    let rows = all, page = 0;

    const status = make("span", { className: "status", role: "status" });
    const previous = make("button", { type: "button", textContent: "Previous" });
    const next = make("button", { type: "button", textContent: "Next" });
    const paged = all.length > size;

    const show = () => {
      const pages = Math.max(1, Math.ceil(rows.length / size));
      page = Math.min(page, pages - 1);
      const from = paged ? page * size : 0;
      const visible = new Set(rows.slice(from, from + size));
      const matching = new Set(rows);
      // Rows of another page are printed, those that do not match are not.
      for (const row of all) {
        row.classList.toggle("off", !matching.has(row));
        row.classList.toggle("later", matching.has(row) && !visible.has(row));
      }
      status.textContent = rows.length === 0 ? "Nothing matches"
        : paged ? `${from + 1} to ${from + visible.size} of ${rows.length}`
        : rows.length < all.length ? `${rows.length} of ${all.length}` : "";
      previous.disabled = page === 0;
      next.disabled = page >= pages - 1;
    };

    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const sorter = make("button", { type: "button" }, ...head.childNodes);
      head.append(sorter);
      sorter.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const keyed = all.map((row) => [value(row, column), row]);
        // What is not known goes last, whichever way the rest goes.
        keyed.sort(([a], [b]) => (a === null) - (b === null) || (a === null ? 0 : up ? order(a, b) : order(b, a)));
        all.splice(0, all.length, ...keyed.map(([, row]) => row));
        const kept = new Set(rows);
        rows = all.filter((row) => kept.has(row));
        body.append(...all);
        page = 0;
        show();
      });
    });

    const tools = make("div", { className: "tools" });
    if ("filter" in table.dataset && all.length > 5) {
      const text = new Map(all.map((row) => [row, row.textContent.toLowerCase()]));
      const input = make("input", { type: "search", placeholder: "Filter by any words" });
      input.setAttribute("aria-label", `Filter: ${table.caption.textContent}`);
      input.setAttribute("aria-controls", table.id);
      input.addEventListener("input", () => {
        const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
        rows = all.filter((row) => words.every((word) => text.get(row).includes(word)));
        page = 0;
        show();
      });
      tools.append(input);
    }
    tools.append(status);
    if (paged) {
      tools.append(make("span", { className: "pages" }, previous, next));
      previous.addEventListener("click", () => { page -= 1; show(); });
      next.addEventListener("click", () => { page += 1; show(); });
    }
    table.parentElement.before(tools);
    show();
  }

  // --- contents
  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      for (const link of links.values()) link.removeAttribute("aria-current");
      links.get(entry.target.id).setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-20% 0px -70% 0px" });
  for (const id of links.keys()) watch.observe(document.getElementById(id));

  addEventListener("beforeprint", () => { for (const box of document.querySelectorAll("details")) box.open = true; });
})();
