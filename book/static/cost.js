// What a plain timm vision transformer costs, in multiply-accumulates (MACs): `tpbook.methods.token_counts` and
// `tpbook.flops.closed_form` of the Python package, number for number.
window.tpbook ??= {};

(() => {
  const method = (score, reduce, place, count) => ({ score, reduce, place, count });

  // name → a point on the three axes, and the rule of its token counts; see tpbook/methods.py
  tpbook.methods = {
    dynamicvit: method("predictor", "drop", "before", "floor"),
    evit: method("class_attention", "fuse", "between", "ceil"),
    "evit, no fusion": method("class_attention", "drop", "between", "ceil"),
    dtps: method("predictor", "squeeze", "before", "floor"),
    etps: method("class_attention", "squeeze", "between", "ceil"),
    random: method("random", "drop", "before", "floor"),
  };

  // the decimal that a number prints as, exactly: 0.7 → [7n, 10n]
  function fraction(ratio) {
    if (!(typeof ratio === "number" && ratio > 0 && ratio <= 1)) {
      throw new RangeError(`ratios must be numbers in (0, 1], got ${ratio}`);
    }
    const [, whole, part = "", exponent = "0"] = /^(\d)(?:\.(\d+))?(?:e(-\d+))?$/.exec(String(ratio));
    return [BigInt(whole + part), 10n ** BigInt(part.length - Number(exponent))];
  }

  // How many patch tokens enter, are kept by and leave each stage, at least one:
  // "floor" keeps ⌊ρ₁⋯ρ_s·N⌋ of the N patches, "ceil" ⌈ρ_s·n⌉ of the n tokens that enter; fusing adds one.
  //   patches: N; ratios: one ρ a stage; method: {count, reduce}   →   [{enter, kept, leave}]
  tpbook.counts = (patches, ratios, { count, reduce }) => {
    let [n, above, below] = [patches, 1n, 1n]; // ρ₁⋯ρ_s = above / below
    return ratios.map((ratio) => {
      const [a, b] = fraction(ratio);
      [above, below] = [above * a, below * b];
      const exact = count === "floor" ? (BigInt(patches) * above) / below : (BigInt(n) * a + b - 1n) / b;
      const enter = n;
      const kept = Math.max(1, Number(exact));
      n = reduce === "fuse" && kept < enter ? kept + 1 : kept;
      return { enter, kept, leave: n };
    });
  };

  // MACs of one image, for P prefix tokens, N patches, C = width:
  //   embed          N · channels · patch² · C
  //   a block        T·4C² + 2·T²·C (q, k, v, output; QKᵀ and AV)  +  T·2·C·hidden (MLP), each for the T tokens it sees
  //   a stage        see `stageMacs`; counts in its block
  //   head           C · classes
  // model: {size, patch, channels, depth, width, hidden, classes, prefix}; method: of `tpbook.methods`, null for the
  // dense model; ratios, at: one ρ and one 0-based block a stage.
  // → {total, embed, head, by_block; tokens: those leaving each block, prefix included;
  //    quadratic: what QKᵀ and AV cost in all; stages: what each stage adds; counts}
  tpbook.macs = ({ size, patch, channels, depth, width, hidden, classes, prefix }, method, ratios = [], at = []) => {
    if (!Number.isInteger(size / patch) || size < patch) {
      throw new RangeError(`size must be a multiple of the patch size ${patch}, got ${size}`);
    }
    if (ratios.length !== at.length) {
      throw new RangeError(`ratios must be as many as the ${at.length} blocks of at, got ${ratios.length}`);
    }
    if (at.some((block, s) => !Number.isInteger(block) || block >= depth || block <= (at[s - 1] ?? -1))) {
      throw new RangeError(`at must be increasing blocks from 0 to ${depth - 1}, got ${at}`);
    }
    const patches = (size / patch) ** 2;
    const counts = method ? tpbook.counts(patches, ratios, method) : [];
    const stages = counts.map((count) => stageMacs(count, method, width, prefix));

    const by_block = [];
    const tokens = [];
    let n = patches;
    let quadratic = 0;
    for (let block = 0; block < depth; block++) {
      const s = method ? at.indexOf(block) : -1;
      const after = s < 0 ? n : counts[s].leave;
      const seen = prefix + (method?.place === "before" ? after : n); // tokens that the attention sees
      n = after;
      const products = 2 * seen ** 2 * width; // QKᵀ and AV
      quadratic += products;
      by_block.push((stages[s] ?? 0) + seen * 4 * width ** 2 + products + (prefix + n) * 2 * width * hidden);
      tokens.push(prefix + n);
    }
    const embed = patches * channels * patch ** 2 * width;
    const head = width * classes;
    const total = by_block.reduce((sum, macs) => sum + macs, embed + head);
    return { total, embed, head, by_block, tokens, quadratic, stages, counts };
  };

  // Scoring and reducing at a stage that n tokens enter and k < n stay at; nothing where all stay.
  function stageMacs({ enter, kept }, { score, reduce }, width, prefix) {
    const pruned = enter - kept;
    if (!pruned) return 0;
    let macs = 0;
    if (score === "predictor") { // C → C → C/2 → C/4 → 2
      const [half, quarter] = [Math.floor(width / 2), Math.floor(width / 4)];
      macs += enter * (width ** 2 + width * half + half * quarter + quarter * 2);
    }
    if (score === "class_attention" || reduce === "fuse") macs += (prefix + enter) * width; // one row of q·Kᵀ
    if (reduce === "fuse") macs += pruned * width; // the weighted sum
    if (reduce === "squeeze") macs += pruned * kept * width; // the similarity of every pruned to every kept token
    return macs;
  }
})();
