// What the theme leaves undone: names for its controls, a keyboard's way into boxes that scroll, search from disk, paper.
if (location.protocol === "file:") {
  DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false; // summaries are fetched, which browsers refuse from disk
}

function reach() {
  const boxes = "pre, article table, article .math, mjx-container, .pst-scrollable-table-container, .cell_output";
  for (const box of document.querySelectorAll(boxes)) {
    const scrolls = box.scrollWidth > box.clientWidth + 1 && getComputedStyle(box).overflowX !== "visible";
    box.classList.toggle("scrolls", scrolls); // book.css then shows that there is more
    if (scrolls) box.tabIndex = 0;
  }
}

document.addEventListener("DOMContentLoaded", () => {
  for (const summary of document.querySelectorAll(".bd-sidenav summary")) {
    const entry = summary.closest("li").querySelector("a");
    summary.setAttribute("aria-label", `Pages under ${entry.textContent.trim()}`);
  }
  for (const named of document.querySelectorAll(".theme-switch-button, .search-button-field, details > summary[aria-label^=Toggle]")) {
    named.removeAttribute("aria-label"); // it hides the words that the control shows
  }
});
addEventListener("load", () => {
  new ResizeObserver(reach).observe(document.querySelector("article") ?? document.body); // menus slide in and out beside it
  window.MathJax?.startup?.promise.then(reach); // equations are set later
});
addEventListener("toggle", reach, true); // what was folded has its width now
addEventListener("beforeprint", () => {
  for (const closed of document.querySelectorAll("article details:not([open])")) closed.open = true;
});
