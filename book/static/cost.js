// What a plain vision transformer costs, in multiply-accumulates (MACs). Methods, count rules and closed form are data,
// `tpbook.rules`, which tpbook/book/cost.py writes into rules.js; here numbers are put in, exactly, in BigInt.
window.tpbook ??= {};

(() => {
  const { rules } = tpbook;
  tpbook.methods = rules.methods;

  const operators = { "+": (a, b) => a + b, "*": (a, b) => a * b, "**": (a, b) => a ** b, "//": (a, b) => a / b };

  // a tree of rules.js and the numbers that its names stand for → BigInt
  function evaluate(tree, numbers) {
    if (!Array.isArray(tree)) return BigInt(typeof tree === "string" ? numbers[tree] : tree);
    const [operator, ...operands] = tree;
    return operands.map((operand) => evaluate(operand, numbers)).reduce(operators[operator]);
  }

  // the decimal that a number prints as, exactly: 0.7 → [7n, 10n]
  function fraction(ratio) {
    if (!(typeof ratio === "number" && ratio > 0 && ratio <= 1)) {
      throw new RangeError(`ratios must be numbers in (0, 1], got ${ratio}`);
    }
    const [, whole, part = "", exponent = "0"] = /^(\d)(?:\.(\d+))?(?:e(-\d+))?$/.exec(String(ratio));
    return [BigInt(whole + part), 10n ** BigInt(part.length - Number(exponent))];
  }

  // How many patch tokens enter, are kept by and leave each stage; at least one is kept, or as many as the method has to.
  //   patches: N; ratios: one ρ a stage; method: of `tpbook.methods`   →   [{enter, kept, leave}]
  tpbook.counts = (patches, ratios, { count: { of, up }, adds, protects, rejoins, least, least_ratio }) => {
    let [enter, added, above, below] = [patches, 0, 1n, 1n]; // ρ₁⋯ρ_s = above / below
    return ratios.map((ratio) => {
      if (ratio < least_ratio) throw new RangeError(`ratios must be ${least_ratio} or more for this method, got ${ratio}`);
      const share = fraction(ratio);
      [above, below] = [above * share[0], below * share[1]];
      const own = enter - added; // without those that an earlier stage added, and that always stay
      const [whole, a, b] = of === "input" ? [patches, above, below] : [own, ...share];
      const exact = ratio === 1 ? own : Number((BigInt(whole) * a + (up ? b - 1n : 0n)) / b);
      const kept = Math.max(Number(evaluate(least, { enter: own })), exact) + added;
      const stage = { enter, kept, leave: kept < enter ? kept + adds : kept };
      if (protects) added += stage.leave - kept;
      if (!rejoins) enter = stage.leave;
      return stage;
    });
  };

  // MACs of one image. A stage counts in its block, what it reads of an attention in the block of that.
  // model: {size, patch, channels, depth, width, hidden, classes, prefix}; method: of `tpbook.methods`, null for the
  // dense model; ratios, at: one ρ and one 0-based block a stage.
  // → {total, embed, head, by_block; tokens: those leaving each block, prefix included;
  //    quadratic: what QKᵀ and AV cost in all; stages: what each stage adds; counts}
  tpbook.macs = (model, method, ratios = [], at = []) => {
    const { size, patch, depth, prefix } = model;
    if (!Number.isInteger(size / patch) || size < patch) {
      throw new RangeError(`size must be a multiple of the patch size ${patch}, got ${size}`);
    }
    if (ratios.length !== at.length) {
      throw new RangeError(`ratios must be as many as the ${at.length} blocks of at, got ${ratios.length}`);
    }
    if (at.some((block, s) => !Number.isInteger(block) || block >= depth || block <= (at[s - 1] ?? -1))) {
      throw new RangeError(`at must be increasing blocks from 0 to ${depth - 1}, got ${at}`);
    }
    const cost = (tree, numbers) => evaluate(tree, { ...model, ...numbers });
    const patches = (size / patch) ** 2;
    const counts = method ? tpbook.counts(patches, ratios, method) : [];
    const works = (s) => s >= 0 && counts[s].kept < counts[s].enter; // a stage that keeps all does nothing
    const stages = counts.map((count, s) => (works(s) ? cost(method.macs, count) : 0n));

    const [by_block, tokens, added] = [[], [], [...stages]];
    let [n, quadratic] = [patches, 0n];
    for (let block = 0; block < depth; block++) {
      const s = method ? at.indexOf(block) : -1;
      const next = block + (method?.before ?? 0); // where the stage stands that reads this block's attention
      const hears = method?.lasting && next >= at[0] ? at.findIndex((b) => b >= next) : at.indexOf(next);
      const heeds = works(hears) || (method?.lasting && hears >= 0 && counts.some((_, later) => later > hears && works(later)));
      const after = s < 0 ? n : counts[s].leave;
      const seen = prefix + (method?.before ? after : n); // tokens that the attention sees
      const products = cost(rules.products, { seen });
      const heard = heeds ? cost(method.heard, { seen }) : 0n;
      quadratic += products;
      by_block.push(cost(rules.linear, { seen, left: prefix + after }) + products + heard + (stages[s] ?? 0n));
      if (heard) added[hears] += heard;
      tokens.push(prefix + after);
      n = after;
    }
    const [embed, head] = [BigInt(patches) * cost(rules.embed), cost(rules.head)];
    const total = by_block.reduce((sum, macs) => sum + macs, embed + head);
    return {
      total: Number(total), embed: Number(embed), head: Number(head), by_block: by_block.map(Number), tokens,
      quadratic: Number(quadratic), stages: added.map(Number), counts,
    };
  };
})();
