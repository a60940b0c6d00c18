// The small explorers of a page, each drawn when it comes near the window: the page's own states, no model and no network.
{
  const near = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      near.unobserve(target);
      const data = JSON.parse(target.querySelector("script").textContent);
      tpbook.explorer(target, data, tpbook.embedded(data));
    }
  }, { rootMargin: "600px" });
  for (const box of document.querySelectorAll(".mini-explorer")) near.observe(box);
}
