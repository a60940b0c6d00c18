// The page's explorer: first the states that the page carries; at the press of a button, models that run in the page.
{
  const root = document.getElementById("explorer");
  const data = JSON.parse(document.getElementById("explorer-data").textContent);
  // explorer.html?method=etps&ratio=0.5 begins there, on the first pictures that have it
  const asked = new URLSearchParams(location.search), method = asked.get("method"), ratio = Number(asked.get("ratio"));
  const set = data.sets.findIndex(({ methods }) => methods[method]);
  if (set >= 0) Object.assign(data.start, { set, method });
  if (ratio > 0 && ratio <= 1) data.start.ratio = ratio;
  const button = document.getElementById("explorer-run"), status = document.getElementById("explorer-status");
  const base = new URL("../_static", location.href).href;
  const ratios = Array.from({ length: 96 }, (_, i) => (5 + i) / 100);
  const carried = tpbook.embedded(data); // of a set whose model is not in this copy of the book nothing else can be asked for
  const runs = (set) => "onnx" in data.sets[set], able = data.sets.findIndex((_, set) => runs(set));
  const explorer = tpbook.explorer(root, data, carried);
  if (!runs(0)) status.textContent += `, of the set “${data.sets[able].name}”; the weights behind the photographs are not part of this copy`;
  const inputs = new Map(); // address of a picture → {tensor, shape}

  // a picture as the model wants it; one that the page carries, or that was read, is cropped already
  async function input(src, preparation) {
    if (!inputs.has(src)) {
      const image = new Image();
      image.src = src;
      await image.decode();
      inputs.set(src, tpbook.pixels(image, { ...preparation, crop: 1 }));
    }
    return inputs.get(src);
  }

  // the same uniform draws at each move, (1, S, N): mulberry32
  function draws(n) {
    let a = 1;
    return Float32Array.from({ length: n }, () => {
      a = (a + 0x6d2b79f5) | 0;
      let t = Math.imul(a ^ (a >>> 15), 1 | a);
      t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
      return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
    });
  }

  const here = {
    ratios: (set) => (runs(set) ? ratios : carried.ratios(set)),
    methods: (set) => (runs(set) ? data.sets[set].onnx.models : data.sets[set].methods),
    takes: runs,
    missing: (set) => runs(set) ? "Methods in grey cannot run in this page: they need trained predictors, or keep another number of tokens of every image." : null,
    async compute(request) {
      const { set, image, method, ratio } = request;
      if (!runs(set)) return carried.compute(request);
      const { images, onnx, shape, at, grid } = data.sets[set];
      const { tensor, shape: size } = await input(images[image].src, onnx.preparation);
      const model = await tpbook.load(base, onnx.models[method], (text) => (status.textContent = `${text} …`));
      const begun = performance.now();
      const { logits, kept, host } = await tpbook.run(model, tensor, size, ratio, draws(at.length * grid[0] * grid[1]));
      const took = performance.now() - begun;
      status.textContent = "The model runs in this page. Nothing leaves your machine.";
      const { total, by_block: macs, tokens } = tpbook.macs(shape, tpbook.methods[method], at.map(() => ratio), at);
      const largest = Math.max(...logits), powers = Array.from(logits, (v) => Math.exp(v - largest)), sum = powers.reduce((a, b) => a + b);
      const top = powers.map((p, c) => [c, p / sum]).sort((a, b) => b[1] - a[1]).slice(0, 5);
      return { kept, host, top, tokens, macs, total, logits, speed: `Computed here in ${took.toFixed(0)} ms.` };
    },
    async upload(file, set) {
      const { canvas } = tpbook.pixels(await tpbook.read(file), data.sets[set].onnx.preparation);
      return { src: canvas.toDataURL("image/png"), alt: file.name, label: "" };
    },
  };

  // asked for once: the model of the state that is shown, and from then on whatever is chosen
  async function run() {
    if (button.disabled) return;
    button.disabled = true;
    try {
      const { set, method } = explorer.request, { models } = data.sets[runs(set) ? set : able].onnx;
      await tpbook.load(base, models[method] ?? Object.values(models)[0], (text) => (status.textContent = `${text} …`));
      button.hidden = true;
      if (document.activeElement === document.body) root.querySelector("input[type=range]").focus(); // it was on the button
      explorer.use(here);
      if (!runs(set)) explorer.pick(able, 0);
    } catch (error) {
      status.textContent = error.message;
      button.disabled = false;
    }
  }

  button.addEventListener("click", run);
  // a picture can be dropped anywhere on the explorer
  for (const type of ["dragover", "drop"]) root.addEventListener(type, (event) => event.preventDefault());
  root.addEventListener("drop", async (event) => {
    const [file] = event.dataTransfer.files;
    await run();
    if (file && button.hidden) explorer.upload(file);
  });
}
