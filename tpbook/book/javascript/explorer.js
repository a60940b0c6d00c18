// The keep-ratio explorer: controls, pictures, prediction and cost of one state at a time.
//
// It computes nothing. A source gives it states: `tpbook.embedded(data)` those that a page carries, the kernel of a notebook
// (tpbook/widgets.py) or a model that runs in the page (book/static/here.js). A classic script, since browsers refuse modules
// from disk; tpbook/widgets.py makes it the module that Jupyter wants.
//
//   source.ratios(set)        the keep ratios that the slider offers
//   source.compute(request)   {set, image, method, ratio, at} → Promise of a state
//   source.upload(file, set)  → Promise of an image; without it there is no file field
//   source.takes(set)         whether a set takes such a picture; without it every set does
//   source.blocks             whether the pruned blocks can be chosen
//   source.methods(set)       object of the methods that can be asked for; without it those that the set names
//   source.missing(set)       why others cannot, in the place of the set's words
//   state                     {kept: [[patch, …] a stage], host: the same or [], top: [[class, p], …], tokens and macs: [a block],
//                             total, speed: words, of a forward just made}
window.tpbook ??= {};

{
  const NS = "http://www.w3.org/2000/svg";

  // an element: h("p", {class: "x"}, "text", child)
  function h(tag, attributes = {}, ...children) {
    const svg = ["svg", "rect", "text", "line", "title"].includes(tag);
    const element = svg ? document.createElementNS(NS, tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value !== false && value != null) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children);
    return element;
  }

  // HTML as it may stand in a credit → nodes: its text, and of its elements the links to the web alone
  function lines(html) {
    const all = document.createTreeWalker(new DOMParser().parseFromString(html, "text/html").body, NodeFilter.SHOW_TEXT), nodes = [];
    while (all.nextNode()) {
      const { data: text, parentElement: within } = all.currentNode, link = within.closest("a[href]");
      if (within.closest("script, style")) continue;
      nodes.push(/^https?:$/.test(link?.protocol) ? h("a", { href: link.href }, text) : text);
    }
    return nodes;
  }

  // hexadecimal bit mask (first patch first) → [patch, …]
  function patchesOf(mask, patches) {
    return Array.from({ length: patches }, (_, i) => i).filter((i) => (parseInt(mask[i >> 2], 16) >> (3 - (i & 3))) & 1);
  }

  // base64 of a byte, or of two (little-endian), a patch → [host of each patch]
  function hostsOf(text, patches) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    return Array.from(bytes.length === patches ? bytes : new Uint16Array(bytes.buffer));
  }

  tpbook.decode = (state, patches) => ({
    ...state,
    kept: state.kept.map((mask) => patchesOf(mask, patches)),
    host: state.host.map((text) => hostsOf(text, patches)),
  });

  // what a page carries: nothing else can be asked for. Where an image decides what is kept, its states say what they cost
  tpbook.embedded = (data) => ({
    ratios: () => data.ratios,
    compute({ set, image, method, ratio }) {
      const { states, costs, grid } = data.sets[set], at = data.ratios.indexOf(ratio);
      return { ...tpbook.decode(states[image][method][at], grid[0] * grid[1]), ...costs[method]?.[at] };
    },
  });

  // MACs in the unit that suits `of`, and that unit
  tpbook.amount = (macs, of = macs) => (of >= 1e9 ? (macs / 1e9).toFixed(2) : (macs / 1e6).toFixed(1));
  tpbook.unit = (of) => (of >= 1e9 ? "GMACs" : "MMACs");
  const percent = (p) => `${(100 * p).toFixed(p < 0.0995 ? 1 : 0)} %`;

  // bars, one a block, over pale ones of the dense model
  tpbook.bars = function (svg, { values, dense, colour, label, format }) {
    const [width, height, left, bottom] = [360, 130, 8, 18];
    const top = Math.max(...dense, ...values), step = (width - left) / dense.length;
    const tall = (v) => (v / top) * (height - bottom - 14);
    const bar = (v, i, extra) => h("rect", {
      x: left + i * step + step * 0.12, y: height - bottom - tall(v), width: step * 0.76, height: tall(v), ...extra,
    });
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("aria-label", label);
    svg.replaceChildren(
      ...dense.map((v, i) => bar(v, i, { class: "dense" })),
      ...values.map((v, i) => bar(v, i, { fill: colour, class: "own" })),
      ...dense.map((_, i) => h("text", { x: left + (i + 0.5) * step, y: height - 4, "text-anchor": "middle" }, `${i}`)),
      h("text", { x: left, y: 10 }, format(top)),
    );
  };

  tpbook.explorer = function (root, data, source) {
    const { sets, paint } = data;
    let busy = false, again = false, state = null, request = null; // request: what the state answers
    const id = `explorer-${Math.random().toString(36).slice(2, 8)}`;
    const chosen = { set: 0, image: 0, at: sets[0].at, follow: -1, view: "kept", ...data.start };
    const set = () => sets[chosen.set];
    const patches = () => set().grid[0] * set().grid[1];
    const takes = (s) => source.takes?.(s) !== false;
    const ratios = () => source.ratios(chosen.set);
    const place = (i) => `row ${Math.floor(i / set().grid[1]) + 1}, column ${(i % set().grid[1]) + 1}`;

    // ---- controls
    const images = h("div", { class: "images" });
    const methods = h("fieldset", { class: "choice methods" });
    const why = h("p", { class: "note" });
    const value = h("output", { for: `${id}-ratio` });
    const slider = (name, oninput) => h("input", { type: "range", id: `${id}-${name}`, min: 0, step: 1, value: 0, oninput });
    const limit = h("p", { class: "note" });
    const ratio = slider("ratio", () => change("ratio", ratios()[+ratio.value]));
    const radio = (name, value, checked, onchange, more) =>
      h("input", { type: "radio", name: `${id}-${name}`, value, checked, onchange, ...more });
    const view = h("fieldset", { class: "choice view" }, h("legend", {}, "Show"),
      h("label", {}, radio("view", "kept", true, () => change("view", "kept")), "patches that are left"),
      h("label", {}, radio("view", "host", false, () => change("view", "host")), "which token carries which patch"));
    const followed = h("output", { for: `${id}-follow` });
    const follow = slider("follow", () => change("follow", +follow.value - 1));
    const blocks = h("fieldset", { class: "choice blocks" });
    const file = h("input", { type: "file", accept: "image/*", id: `${id}-file`, onchange: () => upload(file.files[0]) });
    const own = h("p", { class: "own", hidden: true }, h("label", { for: `${id}-file` }), file);
    // ---- what they show
    const said = h("p", { class: "said", role: "status" });
    const panels = h("div", { class: "panels" });
    const credit = h("p", { class: "note" });
    const top = h("table", { class: "top" });
    const tokens = h("svg", { role: "img" }), macs = h("svg", { role: "img" });
    const numbers = h("table");
    root.classList.add("explorer");
    root.replaceChildren(
      images, own, methods, why,
      h("p", { class: "slider" }, h("label", { for: `${id}-ratio` }, "Keep ratio ρ"), ratio, value), limit,
      blocks, said, view, panels,
      h("p", { class: "slider" }, h("label", { for: `${id}-follow` }, "Follow a patch"), follow, followed), credit,
      h("div", { class: "results" },
        h("section", {}, h("h3", {}, "Prediction"), top),
        h("section", {}, h("h3", {}, "Tokens after each block"), tokens),
        h("section", {}, h("h3", {}, "MACs of each block"), macs)),
      h("details", {}, h("summary", {}, "The same as numbers"), numbers),
    );

    function change(name, to) {
      chosen[name] = to;
      if (name === "view" || name === "follow") show();
      else refresh();
    }

    // everything that depends on the source and on which set is chosen
    function controls() {
      images.replaceChildren(...sets.map((group, g) => h("fieldset", { class: "choice" }, h("legend", {}, group.name),
        ...group.images.map((image, i) => h("label", { class: "thumb" },
          radio("image", i, g === chosen.set && i === chosen.image, () => pick(g, i), { "aria-label": image.alt }),
          h("img", { src: image.src, alt: "" }))))));
      const known = source.methods?.(chosen.set) ?? set().methods;
      if (!known[chosen.method]) chosen.method = Object.keys(known)[0];
      methods.replaceChildren(h("legend", {}, "Method"), ...Object.entries(data.methods).map(([name, { title }]) =>
        h("label", { class: known[name] ? "" : "off" },
          radio("method", name, name === chosen.method, () => change("method", name), { disabled: !known[name] }), title)));
      why.textContent = Object.keys(known).length < Object.keys(data.methods).length ? source.missing?.(chosen.set) ?? set().missing : "";
      ratio.min = 0;
      ratio.max = ratios().length - 1;
      const near = ratios().map((r) => Math.abs(r - chosen.ratio));
      ratio.value = near.indexOf(Math.min(...near));
      chosen.ratio = ratios()[+ratio.value];
      follow.max = patches();
      blocks.hidden = !source.blocks;
      const box = (i) =>
        h("input", { type: "checkbox", value: i, checked: chosen.at.includes(i), onchange: ({ target }) => toggle(i, target) });
      blocks.replaceChildren(h("legend", {}, "Pruned blocks"),
        ...set().dense.tokens.map((_, i) => h("label", {}, box(i), `${i}`)));
      own.hidden = !source.upload || !takes(chosen.set);
      own.firstChild.textContent = `A picture of your own (${set().name}): `;
    }

    function pick(s, image) {
      const other = s !== chosen.set;
      Object.assign(chosen, { set: s, image });
      if (other) {
        Object.assign(chosen, { follow: -1, at: set().at });
        controls();
        images.querySelector("input:checked").focus();
      }
      refresh();
    }

    function toggle(i, box) {
      const at = box.checked ? [...chosen.at, i].sort((a, b) => a - b) : chosen.at.filter((b) => b !== i);
      if (!at.length) return (box.checked = true); // one block at least
      change("at", at);
    }

    async function upload(picture) {
      if (!picture) return;
      const to = takes(chosen.set) ? chosen.set : sets.findIndex((_, s) => takes(s));
      said.textContent = `Reading ${picture.name} …`;
      file.value = ""; // so that the same file can be chosen again
      try {
        const length = sets[to].images.push(await source.upload(picture, to));
        Object.assign(chosen, { set: to, image: length - 1, at: to === chosen.set ? chosen.at : sets[to].at });
        controls();
        refresh();
      } catch (error) {
        said.textContent = error.message;
      }
    }

    // the last state stays until the next is there; of moves made meanwhile only the last counts
    async function refresh() {
      const { title, least_ratio: least } = data.methods[chosen.method];
      ratio.min = ratios().findIndex((r) => r >= least); // moves a slider that stands below
      chosen.ratio = ratios()[+ratio.value];
      limit.hidden = !least;
      limit.textContent = least ? `${title} stops at ρ = ${least.toFixed(2)}: at least that share stays at every stage.` : "";
      value.textContent = chosen.ratio.toFixed(2);
      ratio.setAttribute("aria-valuetext", `keep ratio ${value.textContent}`);
      if (busy) return void (again = true);
      busy = true;
      root.setAttribute("aria-busy", "true");
      do {
        again = false;
        const asked = { ...chosen };
        if (!set().images.length) {
          said.textContent = "Choose a picture.";
          break;
        }
        try {
          const answer = await source.compute(asked);
          await picture(sets[asked.set].images[asked.image].src);
          [state, request] = [answer, asked];
          root.classList.remove("stale");
          show();
          performance.mark("explorer-shown");
        } catch (error) {
          root.classList.add("stale"); // what is still drawn is not what was asked for
          said.textContent = error.message;
        }
      } while (again);
      busy = false;
      root.setAttribute("aria-busy", "false");
    }

    // ---- drawing
    const pictures = new Map();
    async function picture(src) {
      if (pictures.has(src)) return;
      const image = new Image();
      image.src = src;
      await image.decode();
      pictures.set(src, image);
    }

    function show() {
      if (request?.set !== chosen.set) return; // the answer to come is of another model
      const { method } = request, { dense, classes, at } = set(), { colour, gone, rejoins } = data.methods[method];
      const image = set().images[request.image], drawn = pictures.get(image.src), N = patches();
      const squeezes = state.host.length > 0, hosts = squeezes && chosen.view === "host";
      view.hidden = !squeezes;
      const where = source.blocks ? request.at : at;

      const left = state.kept.map((kept) => kept.filter((i) => i >= 0).length);
      const others = rejoins ? `, the others ${gone}` : "";
      const captions = ["What the model sees", ...where.map((b, s) => `Stage ${s + 1}, block ${b}: ${left[s]} of ${N}`)];
      while (panels.children.length > captions.length) panels.lastChild.remove();
      captions.forEach((caption, s) => {
        if (!panels.children[s]) {
          const canvas = h("canvas", { role: "img", onclick: (event) => point(event, canvas) });
          panels.append(h("figure", {}, canvas, h("figcaption")));
        }
        const [canvas, text] = panels.children[s].children;
        text.textContent = caption;
        draw(canvas, drawn, rejoins, s ? new Set(state.kept[s - 1]) : null, s && hosts ? state.host[s - 1] : null);
        canvas.setAttribute("aria-label", s ? `${caption} patches left${others}${middle(state.kept[s - 1])}` : `${image.alt}, ${N} patches`);
      });
      follow.value = chosen.follow + 1;
      followed.textContent = fate(chosen.follow);
      follow.setAttribute("aria-valuetext", followed.textContent);

      const name = (c) => classes[c] ?? `class ${c}`;
      top.replaceChildren(h("tbody", {}, ...state.top.map(([c, p]) => h("tr", { class: name(c) === image.label ? "true" : "" },
        h("th", { scope: "row" }, name(c)), h("td", {}, percent(p)), h("td", { class: "bar", "aria-hidden": "true" }, bar(p, colour))))));
      const [[best, p]] = state.top, saved = 1 - state.total / dense.total;
      said.textContent = [
        `${data.methods[method].title}, ρ = ${request.ratio.toFixed(2)}: ${left.join(", ")} of ${N} patches left${others}.`,
        `Prediction: ${name(best)}, ${percent(p)}${image.label ? ` (truth: ${image.label})` : ""}.`,
        state.macs && `${tpbook.amount(state.total, dense.total)} of ${tpbook.amount(dense.total)} ${tpbook.unit(dense.total)}`
          + ` (${saved < 0 ? "+" : "−"}${percent(Math.abs(saved))}).`,
        state.speed,
      ].filter(Boolean).join(" ");
      credit.replaceChildren(...lines(image.credit ?? ""));
      tpbook.bars(tokens, { values: state.tokens, dense: dense.tokens, colour, format: (v) => `${v}`,
        label: `Tokens after blocks 0 to ${dense.tokens.length - 1}: ${state.tokens.join(", ")}` });
      macs.parentElement.hidden = !state.macs; // unknown of blocks other than timm's plain ones
      if (state.macs) {
        const most = Math.max(...dense.macs), list = state.macs.map((v) => tpbook.amount(v, most)).join(", ");
        tpbook.bars(macs, { values: state.macs, dense: dense.macs, colour, format: (v) => `${tpbook.amount(v)} ${tpbook.unit(v)}`,
          label: `MACs of blocks 0 to ${dense.macs.length - 1}: ${list} ${tpbook.unit(most)}` });
      }
      const count = (list, i) => list?.[i].toLocaleString("en") ?? "–";
      numbers.replaceChildren(
        h("thead", {}, h("tr", {}, ...["Block", "Tokens", "of dense", "MACs", "of dense"].map((text) => h("th", { scope: "col" }, text)))),
        h("tbody", {}, ...dense.tokens.map((n, i) => h("tr", {}, h("th", { scope: "row" }, `${i}`),
          ...[state.tokens[i], n, count(state.macs, i), count(dense.macs, i)].map((v) => h("td", {}, `${v}`))))));
    }

    function bar(p, colour) {
      const filled = h("span");
      filled.style.cssText = `width: ${100 * p}%; background: ${colour}`;
      return filled;
    }

    // for who cannot see them: where the patches are that are left
    function middle(kept) {
      const left = kept.filter((i) => i >= 0), [rows, columns] = set().grid;
      if (left.length === patches()) return "";
      const mean = (of) => left.reduce((sum, i) => sum + of(i), 0) / left.length;
      const down = (mean((i) => Math.floor(i / columns)) + 0.5) / rows, across = (mean((i) => i % columns) + 0.5) / columns;
      return `, centred ${percent(across)} across and ${percent(down)} down`;
    }

    // what became of a patch
    function fate(patch) {
      if (patch < 0) return "none; choose one here or in a picture";
      const stages = [...state.kept.keys()].filter((s) => !state.kept[s].includes(patch)), [gone] = stages;
      if (!stages.length) return `${place(patch)}: left to the end`;
      const { gone: said, hosts, rejoins } = data.methods[request.method];
      if (rejoins) return `${place(patch)}: ${said} from stage ${stages.map((s) => s + 1).join(", ")} on, until the next one`;
      const host = state.host[gone]?.[patch], last = state.host.at(-1)?.[patch];
      const after = hosts ? `${said} ${place(host)}` : said;
      return `${place(patch)}: ${after} at stage ${gone + 1}` + (last !== host ? `, in the end in ${place(last)}` : "");
    }

    function point(event, canvas) {
      const [rows, columns] = set().grid, box = canvas.getBoundingClientRect();
      const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
      const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
      change("follow", row * columns + column);
    }

    // the picture with what is gone painted over, half so where it only waits, and the rest outlined; or each token's patches
    // in their mean colour
    function draw(canvas, drawn, waits, kept, host) {
      const [rows, columns] = set().grid, cell = Math.max(1, Math.round(448 / columns));
      Object.assign(canvas, { width: columns * cell, height: rows * cell });
      const context = canvas.getContext("2d", { willReadFrequently: true });
      const square = (i) => [(i % columns) * cell, Math.floor(i / columns) * cell, cell, cell];
      context.imageSmoothingEnabled = drawn.width > canvas.width / 4; // patches of few pixels stay sharp
      context.drawImage(drawn, 0, 0, canvas.width, canvas.height);
      const all = Array.from({ length: rows * columns }, (_, i) => i);
      // a line wherever neighbours are of different kinds
      const outline = (kind, width) => {
        context.fillStyle = paint.edge;
        for (const i of all) {
          const [x, y] = square(i), half = width / 2;
          if (i % columns && kind(i) !== kind(i - 1)) context.fillRect(x - half, y - half, width, cell + width);
          if (i >= columns && kind(i) !== kind(i - columns)) context.fillRect(x - half, y - half, cell + width, width);
        }
      };
      if (host) {
        const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data, sums = new Map();
        for (let y = 0; y < canvas.height; y++) for (let x = 0; x < canvas.width; x++) {
          const of = host[Math.floor(y / cell) * columns + Math.floor(x / cell)], at = 4 * (y * canvas.width + x);
          const sum = sums.get(of) ?? sums.set(of, [0, 0, 0, 0]).get(of);
          for (let c = 0; c < 3; c++) sum[c] += pixels[at + c];
          sum[3]++;
        }
        for (const i of all) {
          const [r, g, b, n] = sums.get(host[i]);
          context.fillStyle = `rgb(${r / n}, ${g / n}, ${b / n})`;
          context.fillRect(...square(i));
        }
        outline((i) => host[i], 2);
        for (const token of sums.keys()) {
          const [x, y] = square(token);
          context.beginPath();
          context.arc(x + cell / 2, y + cell / 2, cell / 7, 0, 7);
          context.fillStyle = "#E69F00";
          context.fill();
        }
      } else if (kept) {
        context.fillStyle = paint.gone;
        context.globalAlpha = waits ? 0.65 : 1;
        for (const i of all) if (!kept.has(i)) context.fillRect(...square(i));
        context.globalAlpha = 1;
        outline((i) => kept.has(i), 4);
      }
      if (chosen.follow >= 0) {
        const group = host ? all.filter((i) => host[i] === host[chosen.follow]) : [chosen.follow];
        context.lineWidth = Math.max(2, cell / 8);
        context.strokeStyle = "#D55E00";
        for (const i of group) context.strokeRect(...square(i));
      }
    }

    controls();
    refresh();
    const self = {
      get state() { return state; },
      get request() { return request; },
      get busy() { return busy; },
      upload,
      pick,
      use(other) {
        source = other;
        controls();
        refresh();
      },
    };
    root.explorer = self;
    return self;
  };
}
