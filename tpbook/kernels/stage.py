"""What a stage does on a GPU, in five kernels of Triton; each gives what a function of PyTorch's operators gives.

A stage starts some ten to thirty of PyTorch's operators, over float32 copies of all tokens. A GPU waits for the former
at small batches, and for the latter at large ones. A kernel here reads the tokens in their own dtype, sums in float32,
and adds up in a fixed order, so that a result does not change from run to run::

    row      softmax(q_cls Kᵀ / √d), mean over heads         `tpbook.attention.heard`
    rank     order of the scores, without sorting            `tpbook.plan.Plan.rank`
    collect  prefix, kept tokens, Σ a_i x_i of the others    `tpbook.methods.evit.fuse`, `tpbook.tokens.retain`
    squeeze  host(i) = argmax_j cos(x_i, x_j), y_j           `tpbook.methods.tps.squeeze_others`; two kernels

They run for tensors on CUDA without gradient (`tpbook.kernels`). Index letters are the shapes': B images, H heads,
T tokens, D channels a head, C channels, P prefix tokens, n patch tokens, k of them kept, p = n − k others.

Chapter: :doc:`/book/speed`
"""

import torch
import triton
import triton.language as tl


def row(q, k, scale):
    """The class token's row of the attention.

    Args:
        q, k: (B, H, ≥ 1, D), of which the first is read, and (B, H, T, D).
        scale: usually 1 / √D.

    Returns:
        (B, T) float32, the mean over heads.
    """
    q, k = _last(q), _last(k)
    batch, heads, tokens, dim = k.shape
    out = torch.empty(batch, heads, tokens, dtype=torch.float32, device=k.device)
    _row[batch, heads](q, k, out, scale, tokens, dim, *q.stride()[:2], *k.stride()[:3], 256, 64, num_warps=8)
    return out.mean(dim=1)


@triton.jit
def _row(q, k, out, scale, T, D, qB, qH, kB, kH, kT, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q, k, out = q + b * qB + h * qH, k + b * kB + h * kH, out + (b * tl.num_programs(1) + h) * T
    top, total = tl.full([], float("-inf"), tl.float32), tl.full([], 0.0, tl.float32)
    for start in range(0, T, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        logits_T = tl.zeros([BLOCK_T], tl.float32)
        for first in range(0, D, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            q_D = tl.load(q + d, mask=d < D, other=0).to(tl.float32)
            inside = (t < T)[:, None] & (d < D)[None, :]
            k_TD = tl.load(k + t[:, None] * kT + d[None, :], mask=inside, other=0).to(tl.float32)
            logits_T += tl.sum(k_TD * q_D[None, :], axis=1)
        logits_T = tl.where(t < T, logits_T * scale, float("-inf"))
        tl.store(out + t, logits_T, mask=t < T)
        higher = tl.maximum(top, tl.max(logits_T, axis=0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(logits_T - higher), axis=0)
        top = higher
    tl.debug_barrier()  # what is read now was written above
    for start in range(0, T, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        tl.store(out + t, tl.exp(tl.load(out + t, mask=t < T, other=0) - top) / total, mask=t < T)


def rank(scores, k, invert=False):
    """Positions of the best: how many are ahead of a token is its place, so nothing is sorted.

    Args:
        scores: (B, n); of equal ones the earlier goes first, and NaN is the highest.
        k: how many places are wanted.
        invert: the lowest first.

    Returns:
        (B, k) int64.
    """
    batch, n = scores.shape
    order = torch.empty(batch, k, dtype=torch.int64, device=scores.device)
    _rank[batch, triton.cdiv(n, 32)](scores, order, n, k, *scores.stride(), invert, 32, 256)
    return order


@triton.jit
def _rank(scores, order, n, k, sB, sN, INVERT: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    own_I = _comparable(tl.load(scores + b * sB + i * sN, mask=i < n, other=0), INVERT)
    place_I = tl.zeros([BLOCK_I], tl.int32)
    for start in range(0, n, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        other_J = _comparable(tl.load(scores + b * sB + j * sN, mask=j < n, other=0), INVERT)
        equal_IJ = (other_J[None, :] == own_I[:, None]) & (j[None, :] < i[:, None])
        ahead_IJ = ((other_J[None, :] > own_I[:, None]) | equal_IJ) & (j < n)[None, :]
        place_I += tl.sum(ahead_IJ.to(tl.int32), axis=1)
    tl.store(order + b * k + place_I, i.to(tl.int64), mask=(i < n) & (place_I < k))


@triton.jit
def _comparable(scores, INVERT: tl.constexpr):
    """NaN, which is neither more nor less than anything, as the highest; the best first."""
    scores = scores.to(tl.float32)
    scores = tl.where(scores != scores, float("inf"), scores)
    return -scores if INVERT else scores


def collect(x, order, kept, first=0, weights=None):
    """Keep the chosen tokens, and append one that sums the others by their weight.

    Args:
        x: (B, P + n, C) tokens.
        order: (B, n) int64, positions among the n, those to keep before the others; (B, k) without weights.
        kept: k, how many are kept.
        first: P, tokens that stay in any case.
        weights: (B, n), or None to drop the others.

    Returns:
        (B, P + k, C), or (B, P + k + 1, C) with weights.
    """
    x, order = _last(x), order.contiguous()
    batch, tokens, dim = x.shape
    stay, sums = first + kept, weights is not None
    out = x.new_empty(batch, stay + sums, dim)
    grid = (batch, triton.cdiv(stay, 32) + sums, triton.cdiv(dim, 128))
    strides = weights.stride() if sums else (0, 0)
    _collect[grid](
        x, order, weights, out, tokens - first, kept, dim, first, order.shape[1], x.stride(0), x.stride(1), *strides,
        sums, 32, 128
    )  # fmt: skip
    return out


@triton.jit
def _collect(
    x, order, weights, out, n, k, C, P, listed, xB, xT, wB, wN,
    SUMS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    x, order, out = x + b * xB, order + b * listed, out + b * (P + k + SUMS) * C
    if tile * BLOCK_T < P + k:
        t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        from_T = P + tl.load(order + t - P, mask=(t >= P) & (t < P + k), other=0)
        from_T = tl.where(t < P, t, from_T)
        inside = (t < P + k)[:, None] & (c < C)[None, :]
        x_TC = tl.load(x + from_T[:, None] * xT + c[None, :], mask=inside)
        tl.store(out + t[:, None] * C + c[None, :], x_TC, mask=inside)
    elif SUMS:
        sum_C = tl.zeros([BLOCK_C], tl.float32)
        for start in range(k, n, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            from_T = tl.load(order + t, mask=t < n, other=0)
            weight_T = tl.load(weights + b * wB + from_T * wN, mask=t < n, other=0).to(tl.float32)
            inside = (t < n)[:, None] & (c < C)[None, :]
            x_TC = tl.load(x + (P + from_T)[:, None] * xT + c[None, :], mask=inside, other=0).to(tl.float32)
            sum_C += tl.sum(weight_T[:, None] * x_TC, axis=0)
        tl.store(out + (P + k) * C + c, sum_C.to(out.dtype.element_ty), mask=c < C)


def squeeze(x, order, kept, first=0):
    """Squeeze the others into the most similar of the kept tokens.

    Args:
        x: (B, P + n, C) tokens.
        order: (B, n) int64, positions among the n, the hosts before the guests.
        kept: k hosts, of at least 1 and less than n.
        first: P, tokens that stay as they are.

    Returns:
        (B, P + k, C) tokens and (B, n − k) int64 hosts, positions among the k.
    """
    x, order = _last(x), order.contiguous()
    batch, tokens, dim = x.shape
    n, guests = tokens - first, tokens - first - kept
    host = torch.empty(batch, guests, dtype=torch.int64, device=x.device)
    weight = torch.empty(batch, guests, dtype=torch.float32, device=x.device)
    out = x.new_empty(batch, first + kept, dim)
    given = (x, order, host, weight)
    sizes = (n, kept, dim, first, x.stride(0), x.stride(1))
    _match[batch, triton.cdiv(guests, 64)](*given, *sizes, 64, 64, 64)
    grid = (batch, triton.cdiv(first + kept, 32), triton.cdiv(dim, 128))
    _squeeze[grid](*given, out, *sizes, 32, 16, 128, num_stages=1)
    return out, host


@triton.jit
def _match(
    x, order, host, weight, n, k, C, P, xB, xT,
    BLOCK_G: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    x, order = x + b * xB, order + b * n
    from_G = P + tl.load(order + k + g, mask=k + g < n, other=0)
    best_G, host_G = tl.full([BLOCK_G], float("-inf"), tl.float32), tl.zeros([BLOCK_G], tl.int32)
    length_G = tl.zeros([BLOCK_G], tl.float32)
    for start in range(0, k, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        from_H = P + tl.load(order + h, mask=h < k, other=0)
        dot_GH = tl.zeros([BLOCK_G, BLOCK_H], tl.float32)
        square_G, square_H = tl.zeros([BLOCK_G], tl.float32), tl.zeros([BLOCK_H], tl.float32)
        for first in range(0, C, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            guest_GC = tl.load(x + from_G[:, None] * xT + c[None, :], mask=(c < C)[None, :], other=0)
            host_HC = tl.load(x + from_H[:, None] * xT + c[None, :], mask=(c < C)[None, :], other=0)
            dot_GH = tl.dot(guest_GC, tl.trans(host_HC), dot_GH, input_precision="tf32x3")
            square_G += tl.sum(guest_GC.to(tl.float32) * guest_GC.to(tl.float32), axis=1)
            square_H += tl.sum(host_HC.to(tl.float32) * host_HC.to(tl.float32), axis=1)
        length_G = tl.sqrt(square_G) + 1e-6
        cosine_GH = tl.where((h < k)[None, :], dot_GH / (tl.sqrt(square_H) + 1e-6)[None, :], float("-inf"))
        top_G, at_G = tl.max(cosine_GH, axis=1), tl.argmax(cosine_GH, axis=1)
        host_G = tl.where(top_G > best_G, start + at_G, host_G)
        best_G = tl.maximum(best_G, top_G)
    there = k + g < n
    tl.store(host + b * (n - k) + g, host_G.to(tl.int64), mask=there)
    tl.store(weight + b * (n - k) + g, tl.exp(best_G / length_G - 1), mask=there)


@triton.jit
def _squeeze(
    x, order, host, weight, out, n, k, C, P, xB, xT,
    BLOCK_H: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    t, c = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H), tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    x, order, host, weight = x + b * xB, order + b * n, host + b * (n - k), weight + b * (n - k)
    from_H = P + tl.load(order + t - P, mask=(t >= P) & (t < P + k), other=0)
    from_H = tl.where(t < P, t, from_H)
    inside = (t < P + k)[:, None] & (c < C)[None, :]
    y_HC = tl.load(x + from_H[:, None] * xT + c[None, :], mask=inside, other=0).to(tl.float32)
    total_H = tl.full([BLOCK_H], 1.0, tl.float32)
    for start in range(0, n - k, BLOCK_G):
        g = start + tl.arange(0, BLOCK_G)
        from_G = P + tl.load(order + k + g, mask=k + g < n, other=0)
        host_G = tl.load(host + g, mask=k + g < n, other=-1)
        weight_G = tl.load(weight + g, mask=k + g < n, other=0)
        joins_HG = tl.where(host_G[None, :] == (t - P)[:, None], weight_G[None, :], 0.0)
        inside_GC = (k + g < n)[:, None] & (c < C)[None, :]
        guest_GC = tl.load(x + from_G[:, None] * xT + c[None, :], mask=inside_GC, other=0)
        rounded_HG = joins_HG.to(x.dtype.element_ty)
        y_HC = tl.dot(rounded_HG, guest_GC, y_HC, input_precision="tf32x3")
        if x.dtype.element_ty != tl.float32:  # and what was rounded off, so that a sum of half precision is as exact
            y_HC = tl.dot((joins_HG - rounded_HG).to(x.dtype.element_ty), guest_GC, y_HC)
        total_H += tl.sum(joins_HG, axis=1)
    y_HC = y_HC / total_H[:, None]
    tl.store(out + b * (P + k) * C + t[:, None] * C + c[None, :], y_HC.to(out.dtype.element_ty), mask=inside)


def _last(x):
    """x, copied only where what its last index counts does not lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()
