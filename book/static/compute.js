// Models in the reader's browser, from disk too: ONNX Runtime, exported models, and pictures for them. Nothing is
// loaded before a page asks, and nothing leaves the machine. From disk a browser fetches and imports no file, so
// book/pack.py makes each binary a script.
window.tpbook ??= {};
(() => {
  const BYTES = 50e6, PIXELS = 150e6; // of a picture that is read
  const SHORT = 1024; // pixels of the short side that are kept of it
  const cache = new Map(); // address → Promise

  function once(address, make) {
    if (!cache.has(address)) {
      const made = make();
      cache.set(address, made);
      made.catch(() => cache.delete(address)); // so that the next call tries again
    }
    return cache.get(address);
  }

  // What the script NAME.js of book/pack.py says: an object, or base64.
  function said(base, name) {
    return new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = `${base}/${name}.js`;
      script.onerror = () => reject(new Error(`${script.src} is not there`));
      script.onload = () => {
        const value = window.tpbookFiles?.[name];
        if (value === undefined) return reject(new Error(`${script.src} is damaged`));
        delete tpbookFiles[name];
        script.remove();
        resolve(value);
      };
      document.head.append(script);
    });
  }

  // The bytes whose gzip the script NAME.js holds.
  async function unpacked(base, name) {
    const text = atob(await said(base, name));
    const packed = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) packed[i] = text.charCodeAt(i);
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  async function started(base) {
    const module = new Blob([await unpacked(base, "onnxruntime/ort")], { type: "text/javascript" });
    const ort = await import(URL.createObjectURL(module));
    ort.env.wasm.wasmBinary = await unpacked(base, "onnxruntime/wasm");
    ort.env.wasm.numThreads = 1; // several need headers that a server must send
    return ort;
  }

  async function opened(base, name, ort, progress) {
    const index = await once(`${base}/models/index`, () => said(base, "models/index"));
    if (!Object.hasOwn(index, name)) {
      throw new Error(`there is none of that name; there are ${Object.keys(index).join(", ")}`);
    }
    const { weights, about } = index[name];
    const parts = await Promise.all([
      unpacked(base, `models/${name}.graph`),
      once(`${base}/models/${weights}.weights`, () => unpacked(base, `models/${weights}.weights`)),
    ]);
    progress("Starting the model");
    const whole = new Uint8Array(await new Blob(parts).arrayBuffer()); // the two messages, joined, are the model
    return { about, ort, session: await ort.InferenceSession.create(whole, { executionProviders: ["wasm"] }) };
  }

  async function explained(what, promise) {
    try {
      return await promise;
    } catch (error) {
      throw new Error(`${what} could not be loaded: ${error?.message ?? error}`, { cause: error });
    }
  }

  // A model of book/pack.py, ready to run. base: address of _static; name: file name of the exported model, less .onnx;
  // progress: called with a text at each step. → {about, …}; `about` is what tpbook.export noted of the model.
  tpbook.load = async (base, name, progress = () => {}) => {
    base = new URL(base, document.baseURI).href.replace(/\/+$/, "");
    progress("Loading ONNX Runtime");
    const ort = await explained("the runtime", once(base, () => started(base)));
    progress("Loading the model");
    return explained(`the model ${name}`, once(`${base}/sessions/${name}`, () => opened(base, name, ort, progress)));
  };

  // pixels: Float32Array of a (B, C, H, W) = shape batch; keepRatio: ρ, or one a stage; random: Float32Array of
  // (B, S, N) draws, for models that score by them. → {logits: Float32Array (B, K), kept: S arrays (B, n_s),
  // host: S arrays (B, N)}, each row after row, as in tpbook.trace; −1 is a fused token.
  tpbook.run = async ({ ort, session }, pixels, shape, keepRatio, random) => {
    const stages = session.outputNames.filter((name) => name.startsWith("kept_"));
    const feeds = { images: new ort.Tensor("float32", pixels, shape) };
    if (stages.length) {
      const ratios = [keepRatio].flat();
      feeds.keep_ratio = new ort.Tensor("float32", ratios, [ratios.length]);
    }
    if (session.inputNames.includes("random")) {
      if (!random) throw new Error("random must be given: this model scores by random draws");
      const patches = random.length / shape[0] / stages.length;
      feeds.random = new ort.Tensor("float32", random, [shape[0], stages.length, patches]);
    }
    const out = await session.run(feeds);
    const every = (names) => names.filter((name) => name in out).map((name) => Array.from(out[name].data, Number));
    return { logits: out.logits.data, kept: every(stages), host: every(stages.map((s) => s.replace("kept", "host"))) };
  };

  // What a model sees of a picture: short side resized to size / crop, the middle size × size of it, on white,
  // normalised. source: an image, ImageBitmap or canvas (from disk no <img> of another file, whose pixels browsers
  // hide: use a data: address); mean, std: one a channel; channels: 3, or 1 for grey.
  // → {tensor: Float32Array (C·H·W), shape: [1, C, H, W], canvas: the same picture, to show}
  tpbook.pixels = (source, { size, mean, std, channels = 3, crop = 1 }) => {
    const [width, height] = [source.naturalWidth ?? source.width, source.naturalHeight ?? source.height];
    const side = (Math.min(width, height) * size) / Math.floor(size / crop); // of the source; timm rounds down too
    const canvas = Object.assign(document.createElement("canvas"), { width: size, height: size });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.fillStyle = "white";
    context.fillRect(0, 0, size, size);
    context.imageSmoothingQuality = "high";
    context.drawImage(source, (width - side) / 2, (height - side) / 2, side, side, 0, 0, size, size);
    const image = context.getImageData(0, 0, size, size), { data } = image; // (H·W·4)
    if (channels === 1) {
      for (let i = 0; i < data.length; i += 4) { // ITU-R 601, rounded as Pillow does
        const [red, green, blue] = data.subarray(i, i + 3);
        data.fill((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16, i, i + 3);
      }
      context.putImageData(image, 0, 0);
    }
    const area = size * size, tensor = new Float32Array(channels * area);
    for (let c = 0; c < channels; c++) {
      for (let i = 0; i < area; i++) tensor[c * area + i] = (data[4 * i + c] / 255 - mean[c]) / std[c];
    }
    return { tensor, shape: [1, channels, size, size], canvas };
  };

  // (width, height) of a picture file as shown, its camera's rotation applied; none of it is decoded yet.
  function dimensions(file) {
    const image = new Image();
    image.src = URL.createObjectURL(file);
    return new Promise((resolve, reject) => {
      image.onload = () => resolve([image.naturalWidth, image.naturalHeight]);
      image.onerror = reject;
    }).finally(() => URL.revokeObjectURL(image.src));
  }

  // A picture file of the reader → Promise of an ImageBitmap, turned as its camera says, short side at most 1,024
  // pixels. Rejects with an Error in words that names the file.
  tpbook.read = async (file) => {
    const refuse = (why) => { throw new Error(`${file.name} ${why}`); };
    if (!file.size) refuse("is empty");
    if (file.size > BYTES) refuse(`has ${Math.ceil(file.size / 1e6)} MB; at most ${BYTES / 1e6} MB are read`);
    const unknown = () => refuse("is not a picture that this browser can read (JPEG, PNG, WebP and GIF are)");
    const [width, height] = await dimensions(file).catch(unknown);
    if (width * height > PIXELS) refuse(`is ${width} × ${height} pixels; at most ${PIXELS / 1e6} million are read`);
    const options = { imageOrientation: "from-image" }, scale = SHORT / Math.min(width, height);
    if (scale < 1) {
      const [resizeWidth, resizeHeight] = [width, height].map((side) => Math.round(side * scale));
      Object.assign(options, { resizeWidth, resizeHeight, resizeQuality: "high" });
    }
    const damaged = () => refuse("cannot be decoded: it is damaged, incomplete or a drawing (SVG)");
    return createImageBitmap(file, options).catch(damaged);
  };
})();
