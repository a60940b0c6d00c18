// `tpbook.costExplorer(element)`: what a model costs, whole and pruned, as its reader moves the controls.
// Every number comes from `tpbook.macs` (cost.js, loaded before), and so do the methods; looks are in cost-explorer.css.
window.tpbook ??= {};

(() => {
  const PRESETS = {
    "DeiT-Ti": { size: 224, patch: 16, depth: 12, width: 192 },
    "DeiT-S": { size: 224, patch: 16, depth: 12, width: 384 },
    "DeiT-B": { size: 224, patch: 16, depth: 12, width: 768 },
    "ViT-L/16": { size: 224, patch: 16, depth: 24, width: 1024 },
    "digits ViT": { size: 56, patch: 4, depth: 12, width: 64, channels: 1, classes: 10, mlp: 2 },
  };
  const USUAL = { channels: 3, classes: 1000, mlp: 4, prefix: 1 }; // what no control sets; mlp = hidden / width
  const OWN = "own values";
  const PATCHES = [4, 8, 14, 16, 32];

  const sizes = (patch) => {
    const [low, high] = patch < 8 ? [28, 128] : [112, 512];
    return [Math.ceil(low / patch) * patch, Math.floor(high / patch) * patch];
  };
  const quarters = (depth) => [...new Set([1, 2, 3].map((s) => Math.floor((s * depth) / 4)))]; // the default `at`

  const giga = (macs) => (macs >= 1e9 ? (macs / 1e9).toFixed(2) : macs ? (macs / 1e9).toPrecision(3) : "0");
  const percent = (share) => `${(100 * share).toFixed(1)}\u00a0%`;
  const list = (items) => items.join(", ").replace(/, ([^,]*)$/, " and $1");

  // a node with its properties set and its children inside
  function make(tag, properties = {}, ...children) {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  }

  // labelled controls; a slider's value stands beside its name, and is its `ariaValueText` besides
  function slider(name, min, max, step) {
    const input = make("input", { type: "range", min, max, step });
    const value = make("span", { className: "value", ariaHidden: "true" });
    return { input, value, label: make("label", {}, make("span", {}, name), value, input) };
  }
  function choice(name, options) {
    const input = make("select", {}, ...options.map(([value, text]) => make("option", { value }, text)));
    return { input, label: make("label", {}, make("span", {}, name), input) };
  }

  // rows of cells, the first row and the first column headings
  function table(caption, [head, ...rows]) {
    const heading = (text, scope) => make("th", { scope }, text);
    return make("table", {},
      make("caption", {}, caption),
      make("thead", {}, make("tr", {}, ...head.map((text) => heading(text, "col")))),
      make("tbody", {}, ...rows.map(([first, ...cells]) =>
        make("tr", {}, heading(first, "row"), ...cells.map((text) => make("td", {}, text))))));
  }

  tpbook.costExplorer = (element) => {
    // ---- controls
    const preset = choice("preset", [...Object.keys(PRESETS), OWN].map((name) => [name, name]));
    preset.input.lastChild.disabled = true; // shown where the values are the reader's own, never chosen
    const patch = choice("patch size", PATCHES.map((p) => [p, `${p} × ${p}`]));
    const size = slider("resolution", 112, 512, 16);
    const depth = slider("depth", 2, 32, 1);
    const width = slider("width", 64, 1280, 64);
    const facts = make("p", { className: "note" });
    const method = choice("method", Object.entries(tpbook.methods).map(([name, { title }]) => [name, title]));
    const ratio = slider("keep ratio ρ", 0.05, 1, 0.05);
    const limit = make("p", { className: "note" });
    const blocks = make("fieldset", { className: "blocks" });

    // ---- what they give
    const total = make("p", { className: "total", role: "status" });
    const legend = make("p", { className: "legend" });
    const chart = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    chart.setAttribute("role", "img");
    const parts = make("div");
    const stages = make("div");
    const perBlock = make("div");

    element.classList.add("cost-explorer");
    element.replaceChildren(
      make("div", { className: "controls" },
        make("fieldset", {}, make("legend", {}, "The model"),
          ...[preset, size, patch, depth, width].map((control) => control.label), facts),
        make("fieldset", {}, make("legend", {}, "The pruning"), method.label, blocks, ratio.label, limit)),
      total, legend, chart,
      make("div", { className: "tables" }, parts, stages),
      make("details", {}, make("summary", {}, "The chart as a table"), perBlock));

    // ---- state
    let fixed = USUAL;
    const model = () => ({
      ...fixed,
      size: Number(size.input.value), patch: Number(patch.input.value),
      depth: Number(depth.input.value), width: Number(width.input.value),
      hidden: fixed.mlp * Number(width.input.value),
    });
    const at = () => [...blocks.querySelectorAll(":checked")].map((box) => Number(box.value));

    // Offer the resolutions that this patch size divides, and take the nearest to `wanted`.
    function setSize(wanted) {
      const step = Number(patch.input.value);
      const [min, max] = sizes(step);
      Object.assign(size.input, { min, max, step });
      size.input.value = Math.min(max, Math.max(min, Math.round(wanted / step) * step));
    }

    // One box a block, the default blocks ticked.
    function setBlocks() {
      const count = Number(depth.input.value);
      const boxes = Array.from({ length: count }, (_, block) => {
        const box = make("input", { type: "checkbox", value: block, checked: quarters(count).includes(block) });
        return make("label", {}, box, `${block}`);
      });
      blocks.replaceChildren(make("legend", {}, "pruned blocks"), ...boxes);
    }

    function setPreset(name) {
      const values = PRESETS[name];
      const deeper = depth.input.value !== String(values.depth) || !blocks.hasChildNodes();
      fixed = { ...USUAL, ...values };
      for (const [control, value] of [[patch, values.patch], [depth, values.depth], [width, values.width]]) {
        control.input.value = value;
      }
      setSize(values.size);
      if (deeper) setBlocks();
    }

    // ---- drawing
    let drawn; // what the chart shows: [dense, pruned, at, colour]

    function show() {
      const shape = model();
      const chosen = at();
      const pruning = tpbook.methods[method.input.value], { title, colour, least_ratio } = pruning;
      ratio.input.min = Math.max(0.05, least_ratio); // moves a slider that stands below
      const rho = Number(ratio.input.value);
      limit.textContent = least_ratio ? `${title} stops at ρ = ${least_ratio.toFixed(2)}: at least that share stays at every stage.` : "";
      const dense = tpbook.macs(shape, null);
      const pruned = tpbook.macs(shape, pruning, chosen.map(() => rho), chosen);

      const same = (values) => Object.keys(values).every((key) => values[key] === shape[key]);
      preset.input.value = Object.keys(PRESETS).find((key) => same({ ...USUAL, ...PRESETS[key] })) ?? OWN;
      const side = shape.size / shape.patch;
      for (const [control, text] of [
        [size, `${shape.size} px, ${side} × ${side} patches`], [depth, `${shape.depth} blocks`],
        [width, `${shape.width} channels`], [ratio, rho.toFixed(2)],
      ]) {
        control.value.textContent = text;
        control.input.ariaValueText = text;
      }
      facts.textContent = `Also: an MLP ${shape.mlp} times as wide, ${shape.prefix} class token, `
        + `${shape.channels === 1 ? "1 channel" : `${shape.channels} channels`} of input, ${shape.classes} classes.`;

      const saved = 1 - pruned.total / dense.total;
      const change = pruned.total === dense.total ? "nothing saved"
        : saved > 0 ? `${percent(saved)} saved` : `${percent(-saved)} more`;
      total.replaceChildren(make("strong", {}, `${giga(pruned.total)} GMACs`), ` of ${giga(dense.total)} dense: ${change}`);
      const where = chosen.length
        ? `pruned by ${title} at keep ratio ${rho} in ${chosen.length > 1 ? "blocks" : "block"} ${list(chosen)}`
        : "pruned in no block";
      chart.setAttribute("aria-label", `Bar chart of the MACs of ${shape.depth} blocks. The model ${where} costs `
        + `${giga(pruned.total)} GMACs, the dense model ${giga(dense.total)}: ${change}.`);
      legend.replaceChildren(
        swatch("dense", "dense"), swatch("pruned", title), make("span", {}, "▲ pruned block"));
      legend.style.setProperty("--method", colour);

      const share = (macs, cost) => `${giga(macs)} (${percent(macs / cost.total)})`;
      const part = (title, of) => [title, ...[dense, pruned].map((cost) => share(of(cost), cost))];
      const added = (cost) => cost.stages.reduce((sum, macs) => sum + macs, 0);
      parts.replaceChildren(table("GMACs by kind", [
        ["kind", "dense", "pruned"],
        part("linear layers", (cost) => cost.total - cost.quadratic - added(cost)),
        part("QKᵀ and AV, quadratic in tokens", (cost) => cost.quadratic),
        part("what the method adds", added),
      ]));
      const arriving = `${side * side} patches`;
      stages.replaceChildren(chosen.length
        ? table(`Patch tokens at each stage, of ${arriving}`, [
          ["block", "enter", "kept", "leave"],
          ...pruned.counts.map(({ enter, kept, leave }, s) => [`${chosen[s]}`, `${enter}`, `${kept}`, `${leave}`]),
        ])
        : make("p", { className: "note" }, `No block is pruned: all ${arriving} go through.`));
      perBlock.replaceChildren(table("MMACs of each block, and tokens that leave it (the class token too)", [
        ["block", "tokens", "dense", "pruned"],
        ...pruned.by_block.map((macs, i) => [
          `${i}${chosen.includes(i) ? " ▲" : ""}`, `${pruned.tokens[i]}`,
          (dense.by_block[i] / 1e6).toFixed(1), (macs / 1e6).toFixed(1),
        ]),
      ]));
      drawn = { dense: dense.by_block, pruned: pruned.by_block, at: chosen, colour };
      draw();
    }

    const swatch = (kind, text) => make("span", {}, make("i", { className: `swatch ${kind}` }), text);

    // Bars of the pruned model over pale bars of the dense one, one pair a block.
    function draw() {
      const [wide, high, left, top, bottom] = [chart.clientWidth || 640, 230, 46, 20, 34];
      const most = Math.max(...drawn.dense, ...drawn.pruned);
      const [unit, name] = most >= 1e9 ? [1e9, "GMACs"] : [1e6, "MMACs"];
      const step = [1, 2, 2.5, 5, 10].map((m) => m * 10 ** Math.floor(Math.log10(most / 4))).find((s) => most / s <= 4.5);
      const band = (wide - left) / drawn.dense.length;
      const y = (macs) => high - bottom - (macs / most) * (high - bottom - top);
      const every = Math.ceil(22 / band); // labels that have room

      chart.setAttribute("viewBox", `0 0 ${wide} ${high}`);
      chart.style.setProperty("--method", drawn.colour);
      chart.replaceChildren();
      const add = (tag, attributes, text = "") => {
        const node = document.createElementNS(chart.namespaceURI, tag);
        for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
        node.textContent = text;
        chart.append(node);
      };
      for (let tick = 0; tick <= most; tick += step) {
        add("line", { class: "grid", x1: left, x2: wide, y1: y(tick), y2: y(tick) });
        add("text", { class: "tick", x: left - 6, y: y(tick) + 4 }, `${Number((tick / unit).toPrecision(3))}`);
      }
      add("text", { x: 0, y: 11 }, `${name} a block`);
      drawn.dense.forEach((macs, i) => {
        const x = left + i * band;
        const pruned = drawn.pruned[i];
        add("rect", { class: "dense", x: x + 0.1 * band, width: 0.8 * band, y: y(macs), height: y(0) - y(macs) });
        add("rect", { class: "pruned", x: x + 0.22 * band, width: 0.56 * band, y: y(pruned), height: y(0) - y(pruned) });
        if (i % every === 0) add("text", { class: "block", x: x + band / 2, y: y(0) + 14 }, `${i}`);
        if (drawn.at.includes(i)) add("text", { class: "block", x: x + band / 2, y: y(0) + 28 }, "▲");
      });
    }

    element.addEventListener("input", ({ target }) => {
      if (target === preset.input) setPreset(target.value);
      if (target === patch.input) setSize(Number(size.input.value));
      if (target === depth.input) setBlocks();
      show();
    });

    ratio.input.value = 0.7;
    setPreset("DeiT-S");
    show();
    new ResizeObserver(draw).observe(chart);
  };
})();
