"""Attention with a mask that has a gradient, on a GPU: what `tpbook.keep_mask` computes, without its (T, T) matrices.

With logits P = scale · q kᵀ, decisions D and G as there, from tile to tile of queries i and keys j::

    P'_ij = P_ij + log(D_j + 1e-20), for i = j without,   L_i = log Σ_j exp P'_ij,   Ã_ij = exp(P'_ij − L_i)
    O = Ã v,    δ_i = ∂O_i · O_i,    ∂P_ij = Ã_ij (∂O_i · v_j − δ_i)
    ∂v_j = Σ_i Ã_ij ∂O_i,    ∂k_j = scale Σ_i ∂P_ij q_i,    ∂q_i = scale Σ_j ∂P_ij k_j
    ∂D_j = Σ_{heads, i ≠ j} ∂P_ij / (D_j + 1e-20)

Products are of the dtype of q, k and v, float16 or bfloat16, sums and exponentials float32; the order of every sum is
fixed, so a gradient does not change from run to run.

Chapter: :doc:`/book/dynamicvit`
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

BLOCK = 64  # queries, or keys, of a tile


def masked_product(q, k, v, keep, scale):
    """Ã v.

    Args:
        q, k, v: (B, H, T, D), of one dtype.
        keep: (B, T), D.
        scale: usually 1 / √D.

    Returns:
        (B, H, T, D).
    """
    return MaskedProduct.apply(q, k, v, keep.float(), scale)


class MaskedProduct(torch.autograd.Function):
    """Its forward is one kernel, its backward two."""

    @staticmethod
    def forward(ctx, q, k, v, keep, scale):
        """(B, H, T, D) three times, (B, T) → (B, H, T, D)."""
        q, k, v = _alike(q, k, v)
        batch, heads, tokens, dim = q.shape
        out = q.new_empty(batch, tokens, heads, dim).transpose(1, 2)  # as whoever joins the heads needs it
        total = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)  # L
        keep = keep.contiguous()
        _forward[_grid(q)](q, k, v, keep, out, total, scale, *_sizes(q, out))
        ctx.save_for_backward(q, k, v, keep, out, total)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        """(B, H, T, D) → of q, k, v and keep."""
        q, k, v, keep, out, total = ctx.saved_tensors
        gradient = gradient.contiguous()
        dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
        dkeep = torch.empty(*q.shape[:3], dtype=torch.float32, device=q.device)
        given = (q, k, v, keep, out, total, gradient)
        _of_keys[_grid(q)](*given, dk, dv, dkeep, ctx.scale, *_sizes(q, out))
        _of_queries[_grid(q)](*given, dq, ctx.scale, *_sizes(q, out))
        return dq, dk, dv, dkeep.sum(dim=1), None


@triton.jit
def _weights(a_MD, b_ND, logd, i, j, T, scale):
    """P' of queries i, a tile's rows, and keys j, its columns; −∞ beyond the last key."""
    logits_MN = tl.dot(a_MD, tl.trans(b_ND)) * scale
    logits_MN = tl.where(i[:, None] == j[None, :], logits_MN, logits_MN + logd[None, :])
    return tl.where((j < T)[None, :], logits_MN, float("-inf"))


@triton.jit
def _tile(x, t, T, stride, D, BLOCK_D: tl.constexpr):
    """Rows t of a (T, D), zero beyond."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(x + t[:, None] * stride + d[None, :], mask=(t < T)[:, None] & (d < D)[None, :], other=0)


@triton.jit
def _put(x, value, t, T, stride, D, BLOCK_D: tl.constexpr):
    """Write rows t of a (T, D)."""
    d = tl.arange(0, BLOCK_D)
    tl.store(
        x + t[:, None] * stride + d[None, :], value.to(x.dtype.element_ty), mask=(t < T)[:, None] & (d < D)[None, :]
    )


@triton.jit
def _forward(
    q, k, v, keep, out, total, scale, H, T, D, qB, qH, qT, oB, oH, oT, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    q, k, v, out = q + b * qB + h * qH, k + b * qB + h * qH, v + b * qB + h * qH, out + b * oB + h * oH
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    q_MD = _tile(q, i, T, qT, D, BLOCK_D)
    sum_MD = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    top_M, total_M = tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, T, BLOCK):
        j = start + tl.arange(0, BLOCK)
        logd = tl.log(tl.load(keep + b * T + j, mask=j < T, other=0) + 1e-20)
        logits_MN = _weights(q_MD, _tile(k, j, T, qT, D, BLOCK_D), logd, i, j, T, scale)
        higher_M = tl.maximum(top_M, tl.max(logits_MN, axis=1))
        part_MN, shrink_M = tl.exp(logits_MN - higher_M[:, None]), tl.exp(top_M - higher_M)
        total_M = total_M * shrink_M + tl.sum(part_MN, axis=1)
        v_ND = _tile(v, j, T, qT, D, BLOCK_D)
        sum_MD = tl.dot(part_MN.to(v_ND.dtype), v_ND, sum_MD * shrink_M[:, None])
        top_M = higher_M
    _put(out, sum_MD / total_M[:, None], i, T, oT, D, BLOCK_D)
    tl.store(total + tl.program_id(0).to(tl.int64) * T + i, top_M + tl.log(total_M), mask=i < T)


@triton.jit
def _of_keys(
    q, k, v, keep, out, total, gradient, dk, dv, dkeep, scale, H, T, D, qB, qH, qT, oB, oH, oT,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    own, b, h = tl.program_id(0).to(tl.int64), (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    q, k, v, out = q + b * qB + h * qH, k + b * qB + h * qH, v + b * qB + h * qH, out + b * oB + h * oH
    gradient, total = gradient + own * T * D, total + own * T
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k_ND, v_ND = _tile(k, j, T, qT, D, BLOCK_D), _tile(v, j, T, qT, D, BLOCK_D)
    decided = tl.load(keep + b * T + j, mask=j < T, other=0) + 1e-20
    dk_ND, dv_ND = tl.zeros([BLOCK, BLOCK_D], tl.float32), tl.zeros([BLOCK, BLOCK_D], tl.float32)
    dkeep_N = tl.zeros([BLOCK], tl.float32)
    for start in range(0, T, BLOCK):
        i = start + tl.arange(0, BLOCK)
        q_MD, do_MD = _tile(q, i, T, qT, D, BLOCK_D), _tile(gradient, i, T, D, D, BLOCK_D)
        delta_M = tl.sum(do_MD.to(tl.float32) * _tile(out, i, T, oT, D, BLOCK_D).to(tl.float32), axis=1)
        total_M = tl.load(total + i, mask=i < T, other=float("inf"))  # so a row that is not there weighs nothing
        share_MN = tl.exp(_weights(q_MD, k_ND, tl.log(decided), i, j, T, scale) - total_M[:, None])
        dv_ND = tl.dot(tl.trans(share_MN.to(do_MD.dtype)), do_MD, dv_ND)
        dlogits_MN = share_MN * (tl.dot(do_MD, tl.trans(v_ND)) - delta_M[:, None])
        dk_ND = tl.dot(tl.trans(dlogits_MN.to(q_MD.dtype)), q_MD, dk_ND)
        dkeep_N += tl.sum(tl.where(i[:, None] == j[None, :], 0, dlogits_MN), axis=0)
    _put(dk + own * T * D, dk_ND * scale, j, T, D, D, BLOCK_D)
    _put(dv + own * T * D, dv_ND, j, T, D, D, BLOCK_D)
    tl.store(dkeep + own * T + j, dkeep_N / decided, mask=j < T)


@triton.jit
def _of_queries(
    q, k, v, keep, out, total, gradient, dq, scale, H, T, D, qB, qH, qT, oB, oH, oT,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    own, b, h = tl.program_id(0).to(tl.int64), (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    q, k, v, out = q + b * qB + h * qH, k + b * qB + h * qH, v + b * qB + h * qH, out + b * oB + h * oH
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    q_MD, do_MD = _tile(q, i, T, qT, D, BLOCK_D), _tile(gradient + own * T * D, i, T, D, D, BLOCK_D)
    delta_M = tl.sum(do_MD.to(tl.float32) * _tile(out, i, T, oT, D, BLOCK_D).to(tl.float32), axis=1)
    total_M = tl.load(total + own * T + i, mask=i < T, other=float("inf"))
    dq_MD = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for start in range(0, T, BLOCK):
        j = start + tl.arange(0, BLOCK)
        logd = tl.log(tl.load(keep + b * T + j, mask=j < T, other=0) + 1e-20)
        k_ND = _tile(k, j, T, qT, D, BLOCK_D)
        share_MN = tl.exp(_weights(q_MD, k_ND, logd, i, j, T, scale) - total_M[:, None])
        dlogits_MN = share_MN * (tl.dot(do_MD, tl.trans(_tile(v, j, T, qT, D, BLOCK_D))) - delta_M[:, None])
        dq_MD = tl.dot(dlogits_MN.to(k_ND.dtype), k_ND, dq_MD)
    _put(dq + own * T * D, dq_MD * scale, i, T, D, D, BLOCK_D)


def _alike(*parts):
    """Tensors (B, H, T, D) with the strides of the first, and 1 the last; copied where they have others."""
    if all(part.stride() == parts[0].stride() and part.stride(-1) == 1 for part in parts):
        return parts
    return tuple(part.contiguous() for part in parts)


def _grid(q):
    batch, heads, tokens, _ = q.shape
    return batch * heads, triton.cdiv(tokens, BLOCK)


def _sizes(q, out):
    """H, T, D, the strides of q and out, and the tile's sides."""
    dim = q.shape[-1]
    return *q.shape[1:], *q.stride()[:3], *out.stride()[:3], BLOCK, max(16, triton.next_power_of_2(dim))
