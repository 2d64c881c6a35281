"use strict";
// Headings become buttons that sort; without this script the page lacks nothing else.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const isNumber = heading.classList.contains("number");
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const before = heading.getAttribute("aria-sort");
      const first = heading.dataset.first || "ascending";
      const order = before === null ? first : before === "ascending" ? "descending" : "ascending";
      const sign = order === "ascending" ? 1 : -1;
      const keyed = [...body.rows].map((row) => {
        const cell = row.cells[column];
        const key = isNumber ? parseFloat(cell.dataset.sort) : cell.textContent.trim();
        return { row, key, isMissing: isNumber ? Number.isNaN(key) : key === "–" };
      });
      keyed.sort((one, other) => {
        if (one.isMissing || other.isMissing) return one.isMissing - other.isMissing;
        if (isNumber) return sign * (one.key - other.key);
        return sign * one.key.localeCompare(other.key, "en", { numeric: true });
      });
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", order);
      body.append(...keyed.map((one) => one.row));
    });
  });
}
