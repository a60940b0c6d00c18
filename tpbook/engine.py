"""Drives a timm VisionTransformer with fewer and fewer tokens. The methods themselves are in the files beside it.

`prune` swaps the model's class for one whose `forward_features` runs timm's own stem, blocks and norm, and calls a
`Stage` before, or between the two halves of, the blocks listed in `at`. Nothing in the model is copied or replaced,
so LayerScale, q/k norm, fused attention and every dtype stay what timm makes of them, and `unprune` swaps back.

Shapes: B images, P prefix tokens, N patch tokens at the input, n ≤ N of them left, C channels, T = P + n.

Chapter: :doc:`/book/a-tour-of-keep-ratios`
"""

import contextlib
import functools
import numbers
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from timm.layers import Attention, get_device_dtype
from timm.models import VisionTransformer, checkpoint
from timm.models.vision_transformer import Block, init_weights_vit_timm
from torch import Tensor, nn

from .baselines import random_scores, static_scores
from .dynamicvit import KEEP, KeepMask, ScorePredictor, drop, sample
from .evit import class_attention, fuse, weighted_sum
from .methods import METHODS, SCORES, Method, token_counts
from .tps import SIMILARITIES, squeeze, squeeze_masked
from .tracing import Trace


@dataclass
class Tokens:
    """The tokens of one forward, as they pass from stage to stage."""

    x: Tensor  # (B, P + n, C)
    patch: Tensor | None  # (B, n) the original patch of each patch token, −1 for a fused one; None if none asks
    host: Tensor | None  # (B, N) the original patch whose token carries each patch; None with `patch`
    keep: Tensor | None = None  # (B, n) running keep mask D; only while a learned method trains
    mask: KeepMask | None = None  # for `attn_mask`: hides the tokens with D = 0


@dataclass(frozen=True)
class Pruning:
    """How a model is pruned: what `prune` was given, defaults filled in. `model.pruning` returns it."""

    name: str
    method: Method
    at: tuple[int, ...]
    keep_ratio: float | tuple[float, ...]
    invert: bool
    seed: int | None
    known: dict = field(default_factory=dict, init=False, compare=False, repr=False)  # counts by N, once computed

    @property
    def ratios(self):
        """One ρ a stage."""
        return self.keep_ratio if isinstance(self.keep_ratio, tuple) else (self.keep_ratio,) * len(self.at)

    @property
    def attends(self):
        """Whether a stage reads the class token's attention: to score, or to weigh what it fuses."""
        return self.method.score == "class_attention" or self.method.reduce == "fuse"

    def counts(self, patches):
        """list of `StageCount`, one a stage, for N = `patches`."""
        counts = self.known.get(patches) or token_counts(patches, self.ratios, self.method)
        if min(count.kept for count in counts) > 1:  # else it may have warned, and is to warn again
            self.known[patches] = counts
        return counts


class Stage(nn.Module):
    """One pruning stage: score the patch tokens, choose, reduce. It has no parameters of its own.

    `exporting.py` overrides `draw`, `keeps_all`, `choose` and `squeeze`.
    """

    def __init__(self, method, invert, similarity):
        super().__init__()
        self.method, self.invert, self.similarity = method, invert, similarity
        self.source = None  # the attention module whose class-attention row this stage reads
        self.qkv = None  # (B, T, 3·H·D) that it made; held from its forward until this stage runs

    def capture(self, module, args, qkv):
        """Forward hook on `source.qkv`: the row is scored from what attention computes anyway."""
        self.__dict__["qkv"] = qkv  # past nn.Module, whose checks take microseconds

    def draw(self, batch, n, device, generator):
        """(B, n) random scores."""
        return random_scores(batch, n, device=device, generator=generator)

    def keeps_all(self, kept, n):
        """Whether all n tokens stay, so that there is nothing to do."""
        return kept >= n

    def choose(self, scores, kept):
        """(B, n) positions of the tokens, best first; or of the `kept` best ones alone where the others are not used.

        Of equal static scores, and there are many, the earlier token goes first.
        """
        if self.method.reduce == "drop" and self.method.score != "static":
            return scores.topk(kept, largest=not self.invert).indices
        return scores.argsort(dim=1, descending=not self.invert, stable=self.method.score == "static")

    def squeeze(self, kept, pruned):
        """`tps.squeeze` by this stage's similarity."""
        return squeeze(kept, pruned, self.similarity)

    def forward(self, tokens, prefix, kept, predictor, static, generator, trace: Trace | None):
        """Reduce `tokens` to `kept` patch tokens (one more after fusing), or sample who stays while training.

        Args:
            tokens: `Tokens` entering the stage.
            prefix: P.
            kept: how many patch tokens to keep.
            predictor: `ScorePredictor`, for that score.
            static: (N,) scores, for that score.
            generator: torch.Generator of random scores, or None for the global one.
            trace: where to record, or None.

        Returns:
            `Tokens` leaving the stage.
        """
        qkv, self.__dict__["qkv"] = self.qkv, None
        x, score = tokens.x[:, prefix:], self.method.score  # (B, n, C)
        if score == "random":  # drawn whether needed or not, so that later draws do not depend on the ratio
            scores = self.draw(x.shape[0], x.shape[1], x.device, generator)
        sampling, reducing = self.training and score == "predictor", not self.keeps_all(kept, x.shape[1])
        if not (sampling or reducing) and trace is None:
            return tokens

        attention = None
        if self.source is not None:
            attention = class_attention(self.source, qkv, tokens.mask and tokens.mask.keep)  # (B, P + n)
        if score == "class_attention":
            scores = attention[:, prefix:]
        elif score == "static":
            scores = static[tokens.patch.clamp(min=0)].masked_fill(tokens.patch < 0, float("-inf"))
        elif score == "predictor":
            log_probs = predictor(x, tokens.keep)  # (B, n, 2)
            scores = log_probs[..., KEEP]
        if trace is not None:
            trace.scores.append(scores)

        if sampling:
            tokens = self._sample(tokens, prefix, log_probs, attention)
        elif reducing:
            tokens = self._reduce(tokens, prefix, self.choose(scores, kept), kept, attention)

        if trace is not None:
            if tokens.keep is None:
                trace.kept.append(tokens.patch)
            else:
                trace.decisions.append(tokens.keep[:, : tokens.host.shape[1]])
            if self.method.reduce == "squeeze":
                trace.host.append(tokens.host)
        return tokens

    def _reduce(self, tokens, prefix, order, kept, attention):
        """Remove all but `kept` patch tokens, those that come first in `order` (B, n or kept)."""
        x, patch, host = tokens.x, tokens.patch, tokens.host
        chosen, others = order[:, :kept], order[:, kept:]
        if patch is not None:
            patch = drop(patch, chosen)
        if self.method.reduce == "fuse":
            x = fuse(x, order, kept, attention[:, prefix:], prefix)
            if patch is not None:  # −1 is the fused token's, if there is one
                patch = F.pad(patch, (0, x.shape[1] - prefix - patch.shape[1]), value=-1)
            return Tokens(x, patch, host)
        if self.method.reduce == "drop":
            left = drop(x, chosen, prefix)
        else:
            ordered = drop(x, order, prefix)  # (B, n, C)
            left, guest_of = self.squeeze(ordered[:, :kept], ordered[:, kept:])
            if patch is not None:
                host = _move(host, tokens.patch, others, drop(patch, guest_of))
        return Tokens(torch.cat([x[:, :prefix], left], dim=1), patch, host)

    def _sample(self, tokens, prefix, log_probs, attention):
        """Training of a learned method: every token stays, a mask says which of them count."""
        before, x = tokens.x[:, :prefix], tokens.x[:, prefix:]  # (B, P, C), (B, n, C)
        alive = tokens.keep if tokens.keep is not None else torch.ones_like(log_probs[..., KEEP])
        keep = sample(log_probs.flip(-1) if self.invert else log_probs, alive)  # (B, n)
        patch, host = tokens.patch, tokens.host
        if self.method.reduce == "squeeze":
            x, to = squeeze_masked(x, alive, keep, self.similarity)
            host = _move(host, patch, torch.arange(x.shape[1], device=x.device).expand_as(to), drop(patch, to))
        elif self.method.reduce == "fuse":
            x = torch.cat([x, weighted_sum(x, attention[:, prefix:] * alive * (1 - keep))], dim=1)
            keep = torch.cat([keep, torch.ones_like(keep[:, :1])], dim=1)
            patch = torch.cat([patch, patch.new_full((len(patch), 1), -1)], dim=1)
        everyone = torch.cat([torch.ones_like(keep[:, :1]).expand(-1, prefix), keep], dim=1)  # (B, T)
        return Tokens(torch.cat([before, x], dim=1), patch, host, keep, KeepMask(everyone, x.dtype))


def _move(host, patch, guests, hosts):
    """Follow one squeezing: whatever patch the token at `guests` carried is now carried by `hosts`.

    host (B, N), patch (B, n), guests (B, p) positions in patch, hosts (B, p) original patches → (B, N).
    """
    carrier = torch.arange(host.shape[1], device=host.device).expand_as(host)
    return carrier.scatter(1, drop(patch, guests), hosts).gather(1, host)


class PrunedViT:
    """Mixed into the class of a pruned model, ahead of its timm class."""

    @property
    def pruning(self):
        """The `Pruning` in force."""
        return self._pruning

    @property
    def keep_ratio(self):
        """The keep ratio ρ, a float for every stage or a tuple of one a stage. Setting it checks it as `prune` does."""
        return self._pruning.keep_ratio

    @keep_ratio.setter
    def keep_ratio(self, ratio):
        pruning = replace(self._pruning, keep_ratio=_check_ratio(ratio, len(self._pruning.at)))
        pruning.counts(self.patch_embed.num_patches)  # warns where a stage would keep no token
        self._pruning = pruning

    def forward_features(self, images, attn_mask=None, is_causal=False):
        """timm's `forward_features` with tokens removed: (B, in_chans, H, W) → (B, P + n, C).

        Raises:
            ValueError: `attn_mask` or `is_causal` is given; a mask over tokens that get removed has no meaning.
        """
        return self._run(images, attn_mask, is_causal).x

    def forward(self, images, attn_mask=None, is_causal=False):
        """Logits, in training and in eval mode: (B, in_chans, H, W) → (B, classes)."""
        tokens = self._run(images, attn_mask, is_causal)
        if tokens.keep is None:
            return self.forward_head(tokens.x)
        self._pool_keep = tokens.keep
        try:
            return self.forward_head(tokens.x)
        finally:
            self._pool_keep = None

    def _run(self, images, attn_mask, is_causal):
        if attn_mask is not None or is_causal:
            raise ValueError("attn_mask and is_causal must be left unset on a pruned model: its tokens get removed")
        half = None if self.training else _half_on_cpu(images)
        if half is not None and min(self._pruning.ratios) < 1:  # at ρ = 1 a stage that does nothing changes nothing
            recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()  # no measuring in there
            if not recorded and explicit_is_faster(half):
                with _explicit_attention(self.blocks):
                    return self._through_blocks(images)
        return self._through_blocks(images)

    def _through_blocks(self, images):
        pruning, trace = self._pruning, self.__dict__.get("_trace")
        if trace is not None:
            trace.clear()
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(images))))  # (B, P + N, C)
        prefix = self.num_prefix_tokens
        patches = int(x.shape[1]) - prefix
        learned = self.score_predictor if pruning.method.score == "predictor" else (None,) * len(pruning.at)
        stages = dict(zip(pruning.at, zip(self.stages, pruning.counts(patches), learned)))
        static = static_scores(self._grid(images), x.device) if pruning.method.score == "static" else None
        generator = None if pruning.seed is None else torch.Generator(x.device).manual_seed(pruning.seed)

        every = None  # who is who: followed only where that is asked for
        if self.training or trace is not None or static is not None:
            every = torch.arange(patches, device=x.device).expand(x.shape[0], -1)  # (B, N)
        tokens = Tokens(x, every, every)
        for i, block in enumerate(self.blocks):
            if i not in stages:
                tokens.x = self._block(block, tokens)
                continue
            stage, count, predictor = stages[i]
            args = (prefix, count.kept, predictor, static, generator, trace)
            if pruning.method.place == "before":
                tokens = stage(tokens, *args)
                tokens.x = self._block(block, tokens)
            else:  # the two halves of timm's `Block.forward`
                x, mask = tokens.x, tokens.mask
                tokens.x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x), attn_mask=mask)))
                tokens = stage(tokens, *args)
                x = tokens.x
                tokens.x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        tokens.x = self.norm(tokens.x)
        return tokens

    def _block(self, block, tokens):
        if self.grad_checkpointing and torch.is_grad_enabled():
            if not block.attn.qkv._forward_hooks:  # recomputing a block would call a stage's hook again
                return checkpoint(block, tokens.x, attn_mask=tokens.mask)
        return block(tokens.x, attn_mask=tokens.mask)

    def _grid(self, images):
        """(rows, columns) of patches."""
        embed = self.patch_embed
        return embed.dynamic_feat_size(images.shape[-2:]) if self.dynamic_img_size else embed.grid_size

    def pool(self, x, pool_type=None):
        """timm's `pool`; while a learned method trains, tokens it decided to drop do not enter the pool.

        That needs the decisions of the forward, so it holds inside `model(images)` only: `forward_head` called
        by itself in training mode pools every token.
        """
        keep = self._pool_keep  # (B, n)
        pool_type = self.global_pool if pool_type is None else pool_type
        if keep is None or pool_type in ("token", ""):
            return super().pool(x, pool_type)
        prefix = self.num_prefix_tokens
        if self.pool_include_prefix:
            keep = torch.cat([torch.ones_like(keep[:, :1]).expand(-1, prefix), keep], dim=1)
        else:
            x = x[:, prefix:]
        if self.attn_pool is not None:
            return self.attn_pool(x, attn_mask=(keep.float() + 1e-20).log().to(x.dtype)[:, None, None, :])
        keep = keep.unsqueeze(-1).to(x.dtype)
        mean = (x * keep).sum(dim=1) / keep.sum(dim=1)
        peak = x.masked_fill(keep < 0.5, float("-inf")).amax(dim=1)
        return {"avg": mean, "max": peak, "avgmax": 0.5 * (mean + peak)}[pool_type]

    def forward_intermediates(self, *args, **kwargs):
        """Refused: tokens that were removed leave no feature map.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("a pruned model has no feature maps: use tpbook.trace, or tpbook.unprune it first")


def fast_attention(model, images):
    """A context in which attention is explicit where that trains faster: on a CPU in bfloat16, or autocast to it.

    The backward of timm's default there, the fused kernel, hardly gets cheaper with fewer tokens. Blocks that are
    checkpointed keep theirs, since their recomputation comes later; and so do those that get a `KeepMask`, which has
    its own.
    """
    blocks = model.blocks
    if isinstance(model, PrunedViT) and model.training and model.pruning.method.score == "predictor":
        blocks = blocks[: model.pruning.at[0] + (model.pruning.method.place == "between")]
    slow = _half_on_cpu(images) is torch.bfloat16 and not model.grad_checkpointing
    return _explicit_attention(blocks if slow else ())


@contextlib.contextmanager
def _explicit_attention(blocks):
    changed = [block.attn for block in blocks if getattr(block.attn, "fused_attn", False)]
    for attn in changed:
        attn.fused_attn = False
    try:
        yield
    finally:
        for attn in changed:
            attn.fused_attn = True


def _half_on_cpu(images):
    """The half precision that attention will compute in, or None: on a GPU, or in float32."""
    if not images.is_cpu:
        return None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else images.dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


@functools.cache
def explicit_is_faster(dtype):
    """Whether explicit attention is faster than the fused kernel by a tenth, on this CPU without gradients.

    It depends on the processor (in bfloat16 one with AMX favours the fused kernel, others do not), so it is measured,
    once a process.
    """
    q, k, v = torch.ones(3, 8, 6, 197, 64, dtype=dtype)  # DeiT-S, 8 images; nothing drawn from anyone's generator
    seconds = {True: [], False: []}
    for _ in range(7):
        for explicit, times in seconds.items():
            begun = time.perf_counter()
            if explicit:
                ((q * 0.125) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
            else:
                F.scaled_dot_product_attention(q, k, v)
            times.append(time.perf_counter() - begun)
    return statistics.median(seconds[True]) < 0.9 * statistics.median(seconds[False])


@functools.cache
def mixed(mixin, base):
    """The class `base` with `mixin` ahead of it, `_base` remembered."""

    def reduce(self, protocol):  # the class is made at run time, so pickle is told how
        return _empty, (mixin, base), self.__dict__

    name = mixin.__name__.replace("ViT", base.__name__)
    return type(name, (mixin, base), {"_base": base, "__module__": __name__, "__reduce_ex__": reduce})


def _empty(mixin, base):
    cls = mixed(mixin, base)
    return cls.__new__(cls)


def prune(model, method, *, keep_ratio=0.7, at=None, **options):
    """Prune a timm VisionTransformer in place.

    Args:
        model: a timm `VisionTransformer` of attention → MLP blocks; its mode, device and dtype stay.
        method: a name of `tpbook.METHODS`.
        keep_ratio: ρ ∈ (0, 1], relative to the tokens entering a stage; one for all stages, or a sequence of one a
            stage. `model.keep_ratio = …` changes it later.
        at: 0-based indices of the pruned blocks, strictly increasing. Default (d//4, d//2, 3·d//4) for d blocks,
            duplicates dropped: (3, 6, 9) for 12.
        **options: `score`, one of "predictor", "class_attention", "random", "static" (default: the method's own; before
            a block the class attention is that of the block before); `invert`, keep the worst tokens instead of the
            best; `seed`, an int that makes random scores the same in every forward of the same shape (None draws
            from torch's global generator); `fuse` (EViT), False drops what would be fused; `similarity` (TPS),
            "cosine", "euclidean" or a function (B, p, C), (B, k, C) → (B, p, k) that is at most 1.

    Returns:
        The same object. Predictors of a learned score are new, untrained parameters `model.score_predictor`.

    Raises:
        ValueError, TypeError: an argument that cannot be used, named with its value and what is allowed. The model
            is then as it was.

    Warns:
        UserWarning: a stage would keep no token; it keeps one.
    """
    if not isinstance(model, VisionTransformer):
        raise TypeError(f"model must be a timm VisionTransformer, got {type(model).__name__}")
    if isinstance(model, PrunedViT):
        raise ValueError(f"model is pruned already, by {model.pruning.name!r}: tpbook.unprune it first")
    if hasattr(model, "mask_ratio"):
        raise ValueError(f"model is masked, at ratio {model.mask_ratio}: tpbook.unmask it first")
    pruning, similarity = _check(model, method, keep_ratio, at, options)
    pruning.counts(model.patch_embed.num_patches)  # warns where a stage would keep no token

    model.stages = nn.ModuleList(Stage(pruning.method, pruning.invert, similarity) for _ in pruning.at)
    if pruning.attends:
        for stage, i in zip(model.stages, pruning.at):
            attn = model.blocks[i - (pruning.method.place == "before")].attn
            # behind nn.Module's back: the attention is registered once already, in its block
            stage.__dict__["source"] = attn
            attn.qkv.register_forward_hook(stage.capture)
    if pruning.method.score == "predictor":
        dd = get_device_dtype(model)
        model.score_predictor = nn.ModuleList(ScorePredictor(model.embed_dim, **dd) for _ in pruning.at)
        model.score_predictor.apply(init_weights_vit_timm)
    for module in (model.stages, getattr(model, "score_predictor", None)):
        if module is not None:
            module.train(model.training)
    model._pruning, model._pool_keep = pruning, None
    model.__class__ = mixed(PrunedViT, type(model))
    return model


def unprune(model):
    """Undo `prune`: the class, the state dict, the mode and the outputs are what they were.

    Parameters trained meanwhile stay trained; the score predictors are gone.

    Args:
        model: a pruned model.

    Returns:
        The same object.

    Raises:
        ValueError: the model is not pruned.
    """
    if not isinstance(model, PrunedViT):
        raise ValueError(f"model must be pruned by tpbook.prune, got a plain {type(model).__name__}")
    for stage in model.stages:
        if stage.source is not None:
            hooks = stage.source.qkv._forward_hooks
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is stage]:
                del hooks[key]
    del model.stages, model._pruning, model._pool_keep
    if hasattr(model, "score_predictor"):
        del model.score_predictor
    model.__class__ = type(model)._base
    return model


def _check(model, name, keep_ratio, at, options):
    """The `Pruning` and the similarity function that the arguments of `prune` ask for; raises if they cannot be."""
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    method = METHODS[name]
    allowed = {"score", "invert", "seed"}
    allowed |= {"fuse"} if method.reduce == "fuse" else {"similarity"} if method.reduce == "squeeze" else set()
    for option in options:
        if option not in allowed:
            raise TypeError(f"option {option!r} is not known to {name}, which takes {', '.join(sorted(allowed))}")

    score, seed = options.get("score", method.score), options.get("seed")
    similarity = options.get("similarity", "cosine")
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
    for flag in ("invert", "fuse"):
        if not isinstance(options.get(flag, True), bool):
            raise TypeError(f"{flag} must be True or False, got {options[flag]!r}")
    check_seed(seed)
    if not callable(similarity):
        if similarity not in SIMILARITIES:
            raise ValueError(f"similarity must be one of {', '.join(SIMILARITIES)} or a function, got {similarity!r}")
        similarity = SIMILARITIES[similarity]
    reduce = method.reduce if options.get("fuse", True) else "drop"

    at = _check_at(at, len(model.blocks))
    pruning = Pruning(
        name, replace(method, score=score, reduce=reduce), at, _check_ratio(keep_ratio, len(at)),
        options.get("invert", False), seed,
    )  # fmt: skip
    _check_blocks(model, pruning)
    return pruning, similarity


def _check_blocks(model, pruning):
    for i, block in enumerate(model.blocks):
        if type(block).forward is not Block.forward:
            raise ValueError(f"blocks[{i}] must be a timm Block (attention → MLP), got {type(block).__name__}")
    if pruning.attends:
        what = f"{pruning.name} with score={pruning.method.score!r}"
        if model.cls_token is None:
            raise ValueError(f"{what} reads the class token's attention, and this model's cls_token is None")
        if pruning.method.place == "before" and pruning.at[0] == 0:
            raise ValueError(f"{what} reads the attention of the block before, so at={pruning.at} must start above 0")
        for i in pruning.at:
            if type(model.blocks[i].attn).forward is not Attention.forward:
                got = type(model.blocks[i].attn).__name__
                raise ValueError(f"{what} needs timm's Attention in blocks[{i}], got {got}")
    if pruning.method.score == "static" and not isinstance(model.patch_drop, nn.Identity):
        raise ValueError("score='static' needs every patch in its place: build the model with patch_drop_rate=0")
    if pruning.method.score == "predictor" and model.global_pool == "prr":
        raise ValueError("a learned score cannot train on a model with global_pool='prr', whose pool takes no mask")


def default_at(depth):
    """The blocks that are pruned unless others are named: (d//4, d//2, 3·d//4) for d blocks, duplicates dropped."""
    return tuple(sorted({depth // 4, depth // 2, 3 * depth // 4}))


def _check_at(at, depth):
    if at is None:
        return default_at(depth)
    if isinstance(at, (str, bytes)) or not isinstance(at, Iterable):
        raise TypeError(f"at must be a sequence of block indices, got {at!r}")
    at = tuple(at)
    for i in at:
        if isinstance(i, bool) or not isinstance(i, numbers.Integral):
            raise TypeError(f"at must hold ints, got {i!r} in {at}")
        if not 0 <= i < depth:
            raise ValueError(f"at must hold indices from 0 to {depth - 1}, got {i} in {at}")
    if not at or any(b <= a for a, b in zip(at, at[1:])):
        raise ValueError(f"at must name at least one block, strictly increasing, got {at}")
    return tuple(int(i) for i in at)


def check_seed(seed):
    """TypeError unless it is an int or None."""
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, numbers.Integral)):
        raise TypeError(f"seed must be an int or None, got {seed!r}")


def decimals(name, ratio):
    """A ratio, or a sequence of them, as the float of the decimal that was written (NumPy's float32 too), or a tuple.

    Raises:
        TypeError: it is no number and no sequence of numbers; `name` says whose it is.
    """
    several = isinstance(ratio, Iterable) and not isinstance(ratio, (str, bytes, Tensor))
    ratios = tuple(ratio) if several else (ratio,)
    for r in ratios:
        if isinstance(r, bool) or not isinstance(r, numbers.Real):
            raise TypeError(f"{name} must be a number or a sequence of numbers, got {r!r}")
    ratios = tuple(float(str(r)) for r in ratios)
    return ratios if several else ratios[0]


def _check_ratio(ratio, stages):
    checked = decimals("keep_ratio", ratio)
    several = isinstance(checked, tuple)
    for r in checked if several else (checked,):
        if not 0 < r <= 1:
            raise ValueError(f"keep_ratio must lie in (0, 1], got {r!r}")
    if several and len(checked) != stages:
        raise ValueError(f"keep_ratio must be one number or one for each of {stages} stages, got {ratio!r}")
    return checked
