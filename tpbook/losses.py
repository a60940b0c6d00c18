"""What each method is trained on. Every function returns a dict of scalar tensors; `total` is what to minimise.

Labels are class indices (B,) or, after mixup, class probabilities (B, classes).
Smoothed labels are the caller's affair (timm's `Mixup` smooths, or pass probabilities).

DynamicViT and dTPS (``losses.py`` of the official code, `DistillDiffPruningLoss_dynamic`), with ρ^(s) the share of the
original N tokens to be kept after stage s, D^(s) the running decisions, z logits, t features, ' the dense teacher::

    cls        = cross-entropy(z, y)
    ratio_sum  = Σ_s mean_images (mean_i D_i^(s) − ρ^(s))²      the paper divides by S here, the code in `total`
    logit_kl   = KL(softmax z' ‖ softmax z), mean over images             the paper writes KL(z ‖ z')
    token mse  = mean over kept tokens and channels of (t − t')²          the paper sums over channels
          kl   = mean over kept tokens of KL(softmax t' ‖ softmax t)      over channels, dTPS's recipe; with LV-ViT
                                                 over the classes of its auxiliary head: t and t' are that head's logits
    total      = cls + 2·ratio_sum/S + ½·logit_kl + ½·token

"Kept" is after the last stage, and the token term's mean is over the kept tokens of the whole batch. With several
processes it is a mean over each process's own, as in the official code, so it is not quite the joint batch's.

Chapter: :doc:`/book/dynamicvit`
"""

import torch
import torch.nn.functional as F

TOKEN = ("mse", "kl")


def classification(logits, labels, *, teacher_logits=None, logit_weight=0.5, token_logits=None, aux_weight=0.5):
    """Cross-entropy, and where a teacher is given KL to its logits.

    With `token_logits` also LV-ViT's token labels (``tlt/loss/cross_entropy.py`` of zihangJiang/TokenLabeling) where
    nobody has labelled the tokens: each has its image's label. Its weights are 1 and ½.

    Args:
        logits: (B, classes).
        labels: (B,) int64 or (B, classes) probabilities.
        teacher_logits: (B, classes) or None.
        logit_weight: of `logit_kl` in the total.
        token_logits: (B, N, classes) or None.
        aux_weight: of `aux` in the total.

    Returns:
        dict: "cls", "total", with a teacher "logit_kl", and with `token_logits` "aux".
    """
    terms = {"cls": F.cross_entropy(logits, labels)}
    terms["total"] = terms["cls"]
    if teacher_logits is not None:
        terms["logit_kl"] = _kl(logits, teacher_logits)
        terms["total"] = terms["cls"] + logit_weight * terms["logit_kl"]
    if token_logits is not None:
        every = labels.repeat_interleave(token_logits.shape[1], 0)  # (B·N,) or (B·N, classes)
        terms["aux"] = F.cross_entropy(token_logits.flatten(0, 1), every)
        terms["total"] = terms["total"] + aux_weight * terms["aux"]
    return terms


def masked(logits, labels):
    """Masked fine-tuning (Shi & Wang 2023): cross-entropy alone, on logits of the visible patches."""
    return classification(logits, labels)


def evit(logits, labels):
    """EViT (Liang et al. 2022): cross-entropy alone; no teacher."""
    return classification(logits, labels)


def etps(logits, labels, *, teacher_logits=None, logit_weight=0.5):
    """eTPS (Wei et al. 2023): cross-entropy, and KL to a teacher's logits where one is given.

    eTPS was never released. A comment in the authors' code says that their EViT "only employs the distillation loss of
    logit", so we think eTPS was trained with it; without `teacher_logits` this is EViT's objective.
    """
    return classification(logits, labels, teacher_logits=teacher_logits, logit_weight=logit_weight)


def dynamicvit(
    logits, trace, labels, *, teacher_logits, teacher_features, keep_ratios, token="mse",
    ratio_weight=2.0, logit_weight=0.5, token_weight=0.5,
):  # fmt: skip
    """DynamicViT (Rao et al. 2021), in the official code's form; the formulas are at the top of this file.

    Args:
        logits: (B, classes) of the model in training mode.
        trace: the `tpbook.Trace` of that forward.
        labels: (B,) int64 or (B, classes) probabilities.
        teacher_logits, teacher_features: (B, classes) and (B, N, C) of the dense teacher, without gradient; both None
            leaves their terms out. A teacher whose tokens are others gives its logits alone, at a `token_weight` of 0.
        keep_ratios: cumulative shares of the original tokens, one a stage: (ρ, ρ², ρ³).
        token: "mse" or "kl".
        ratio_weight, logit_weight, token_weight: weights in the total; 2, ½ and ½ are the paper's.

    Returns:
        dict: "cls", "ratio_sum", "logit_kl", "token", "total".

    Raises:
        TypeError: `keep_ratios` is no sequence.
        ValueError: an unknown `token`; the trace holds no decisions, or another number of stages than `keep_ratios`;
            or only one of the teacher's outputs is given where both are needed.
    """
    if token not in TOKEN:
        raise ValueError(f"token must be one of {', '.join(TOKEN)}, got {token!r}")
    try:
        keep_ratios = tuple(keep_ratios)
    except TypeError as error:
        raise TypeError(f"keep_ratios must be a sequence, one ratio a stage, got {keep_ratios!r}") from error
    if len(trace.decisions) != len(keep_ratios) or not trace.decisions:
        raise ValueError(
            f"keep_ratios must have one ratio a stage that decided in training mode: "
            f"{len(trace.decisions)} did, got {keep_ratios}"
        )
    alone = teacher_features is None and token_weight == 0
    if (teacher_logits is None) != (teacher_features is None) and not alone:
        raise ValueError("teacher_logits and teacher_features must be given both or neither, unless token_weight is 0")
    kept_shares = [d.float().mean(dim=1) for d in trace.decisions]  # (B,) each
    terms = {
        "cls": F.cross_entropy(logits, labels),
        "ratio_sum": sum((share - ratio).square().mean() for share, ratio in zip(kept_shares, keep_ratios)),
        "logit_kl": logits.new_zeros(()),
        "token": logits.new_zeros(()),
    }
    if teacher_logits is not None:
        terms["logit_kl"] = _kl(logits, teacher_logits)
    if teacher_features is not None:
        last = trace.features.new_ones(trace.features.shape[:2]) if trace.whole else trace.decisions[-1]
        kept = (last > 0.5).float()  # (B, N); a weight, since picking tokens by it would make a GPU wait
        ours, theirs = trace.features[:, : kept.shape[1]].float(), teacher_features.float()  # (B, N, C) each
        gap = (ours - theirs).square().mean(dim=-1) if token == "mse" else _kls(ours, theirs)  # (B, N)
        terms["token"] = (gap * kept).sum() / kept.sum()
    terms["total"] = (
        terms["cls"] + ratio_weight * terms["ratio_sum"] / len(keep_ratios)
        + logit_weight * terms["logit_kl"] + token_weight * terms["token"]
    )  # fmt: skip
    return terms


def dtps(*args, **kwargs):
    """dTPS (Wei et al. 2023): DynamicViT's objective. Arguments as for `dynamicvit`; its recipe takes token="kl"."""
    return dynamicvit(*args, **kwargs)


def avit(
    logits, trace, labels, *, teacher_logits=None, logit_weight=0.5, ponder_weight=5e-4, prior_weight=1e-3,
    prior_depth=2 / 3,
):  # fmt: skip
    """A-ViT (Yin et al. 2022): tokens are to halt early, most of them at one depth.

    With d_l the mean over images and patches of the halting score after block l of L, over the sum of those means, and
    p the density of a Gaussian around block 8 of 12 with a deviation of 1, over its sum::

        total = cls + 5e-4·mean over images and tokens of ρ + 1e-3·Σ_l p_l log(p_l / d_l)

    The official code means to leave the class token out of d, and leaves out the first image of the batch; here the
    prefix tokens are left out. That a token which has halted counts there with 0 is our choice.

    Args:
        logits: (B, classes) of the model in training mode.
        trace: the `tpbook.Trace` of that forward, with a `methods.avit.Halted` as its `state`.
        labels: (B,) int64 or (B, classes) probabilities.
        teacher_logits, logit_weight: as for `classification`.
        ponder_weight, prior_weight: weights in the total.
        prior_depth: where the Gaussian stands, as a share of L.

    Returns:
        dict: "cls", "ponder", "prior", "total", with a teacher "logit_kl".
    """
    terms = classification(logits, labels, teacher_logits=teacher_logits, logit_weight=logit_weight)
    prefix = trace.state.ponder.shape[1] - trace.features.shape[1]
    scores = torch.stack([h[:, prefix:].mean() for h in trace.state.halting])  # (L,)
    blocks = torch.arange(1, len(scores) + 1, device=scores.device)
    log_prior = (-(blocks - prior_depth * len(scores)).square() / 2).log_softmax(dim=0)
    tiny = torch.finfo(scores.dtype).tiny
    log_scores = (scores / scores.sum().clamp(min=tiny)).clamp(min=tiny).log()
    terms["ponder"] = trace.state.ponder.mean()
    terms["prior"] = (log_prior.exp() * (log_prior - log_scores)).sum()
    terms["total"] = terms["total"] + ponder_weight * terms["ponder"] + prior_weight * terms["prior"]
    return terms


def adavit(
    logits, trace, labels, *, teacher_logits=None, logit_weight=0.5, usage=0.5, token_usage=None, weight=2.0,
):  # fmt: skip
    """AdaViT (Meng et al. 2022), our reading: so much of the model is to be used, on average over the batch.

    With the mean of the decisions of all blocks, but for heads and layers of the first, where all are on::

        total = cls + 2·|heads − ½| + 2·|layers − ½| + 2·(tokens − ½)²

    Args:
        logits: (B, classes) of the model in training mode.
        trace: the `tpbook.Trace` of that forward, with a `methods.adavit.Switched` as its `state`.
        labels: (B,) int64 or (B, classes) probabilities.
        teacher_logits, logit_weight: as for `classification`.
        usage: what share of heads and of layers is to be on, ½ above.
        token_usage: what share of tokens is to be in a block; None is `usage`.
        weight: of each of the three in the total.

    Returns:
        dict: "cls", "heads", "layers", "tokens", "total", with a teacher "logit_kl".
    """
    terms = classification(logits, labels, teacher_logits=teacher_logits, logit_weight=logit_weight)
    token_usage = usage if token_usage is None else token_usage
    for name, several in (("heads", trace.state.all_heads), ("layers", trace.state.all_layers)):
        if several:  # none where the model has one stage
            terms[name] = (torch.cat(several, dim=1).mean() - usage).abs()
            terms["total"] = terms["total"] + weight * terms[name]
    terms["tokens"] = (torch.cat(trace.decisions, dim=1).float().mean() - token_usage).square()
    terms["total"] = terms["total"] + weight * terms["tokens"]
    return terms


def ia_red2(
    logits, trace, labels, *, teacher_logits=None, logit_weight=0.5, policy_weight=1.0, penalty=0.5, power=2.0,
):  # fmt: skip
    """IA-RED² (Pan et al. 2021), our reading: a reward for being right with few tokens, by REINFORCE.

    With u the share of the N tokens that are left, mean over stages, a_i the acts on the tokens alive at a stage, which
    stay with probability p_i, and no gradient through the advantage A::

        reward = 1 − u²   where the answer is right,   −½ where it is wrong
        A      = reward − its mean over the batch                                        the baseline is our choice
        policy = −mean over images of A · mean over acts of log(a_i p_i + (1 − a_i)(1 − p_i))
        total  = cls + policy

    Args:
        logits: (B, classes) of the model in training mode.
        trace: the `tpbook.Trace` of that forward, its `scores` the logits of p.
        labels: (B,) int64 or (B, classes) probabilities, of which the largest is right.
        teacher_logits, logit_weight: as for `classification`.
        policy_weight: of "policy" in the total.
        penalty: what a wrong answer costs, ½ above.
        power: of u, 2 above.

    Returns:
        dict: "cls", "policy", "reward", "usage", "total", with a teacher "logit_kl".
    """
    terms = classification(logits, labels, teacher_logits=teacher_logits, logit_weight=logit_weight)
    with torch.no_grad():
        acts = torch.stack(trace.decisions).float()  # (S, B, N), D after each stage
        alive = torch.cat([torch.ones_like(acts[:1]), acts[:-1]])  # before it
        right = logits.argmax(dim=-1) == (labels if labels.dim() == 1 else labels.argmax(dim=-1))
        used = acts.mean(dim=(0, 2))  # (B,)
        reward = torch.where(right, 1 - used**power, -penalty)
        advantage = reward - reward.mean()
    chance = F.logsigmoid(torch.stack(trace.scores).float() * (2 * acts - 1))  # log π of each act
    chance = (chance * alive).sum(dim=(0, 2)) / alive.sum(dim=(0, 2))  # (B,)
    terms |= {"policy": -(advantage * chance).mean(), "reward": reward.mean(), "usage": used.mean()}
    terms["total"] = terms["total"] + policy_weight * terms["policy"]
    return terms


def _kl(student, teacher):
    """KL(softmax teacher ‖ softmax student) over the last dimension, mean over rows."""
    return _kls(student, teacher).mean()


def _kls(student, teacher):
    """The same for each row: (…, C) and (…, C) → (…)."""
    student, teacher = F.log_softmax(student.float(), dim=-1), F.log_softmax(teacher.float(), dim=-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)
