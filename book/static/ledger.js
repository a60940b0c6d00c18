// Searches the ledger's own tables: rows that do not fit are hidden, folds that hold what does are opened.
{
  const box = document.getElementById("ledger-filter");
  const folds = [...document.querySelectorAll("details.ledger")].map((fold) => {
    const paper = fold.closest("section").querySelector("h2, h3").firstChild.textContent;
    const rows = [...fold.querySelectorAll("tbody tr")].map((row) => ({
      row, paper, status: row.lastElementChild.querySelector("strong").textContent, text: row.textContent.toLowerCase(),
    }));
    return { fold, rows };
  });
  const all = folds.flatMap(({ rows }) => rows);

  function element(tag, attributes, ...children) {
    const made = Object.assign(document.createElement(tag), attributes);
    made.append(...children);
    return made;
  }

  function choice(of) {
    const values = [...new Set(all.map((entry) => entry[of]))];
    return element("select", { oninput: show }, new Option("any", ""), ...values.map((value) => new Option(value, value)));
  }

  const words = element("input", { type: "search", oninput: show }), paper = choice("paper"), status = choice("status");
  const found = element("output", {});
  const field = (name, control) => element("label", {}, name, control);
  box.replaceChildren(field("Words", words), field("Paper", paper), field("Status", status), found);

  function show() {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    const asked = wanted.length || paper.value || status.value;
    let count = 0;
    for (const { fold, rows } of folds) {
      let some = false;
      for (const entry of rows) {
        const fits = wanted.every((word) => entry.text.includes(word))
          && [[paper, entry.paper], [status, entry.status]].every(([control, value]) => !control.value || control.value === value);
        entry.row.hidden = !fits;
        some ||= fits;
        count += fits;
      }
      fold.hidden = !some;
      fold.open = Boolean(asked && some);
    }
    found.textContent = `${count} of ${all.length} rows`;
  }

  show();
}
