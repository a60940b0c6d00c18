"""DynamicViT (Rao et al. 2021): a small network scores the tokens and learns to, end to end.

Before each pruned block (``PredictorLG`` and ``softmax_with_policy`` of the official code)::

    z = [MLP_loc(x) ; mean over living tokens of MLP_glob(x)],   π = LogSoftmax(MLP(z))       `ScorePredictor`
    training:   D ← D ⊙ GumbelSoftmax(π)_keep, straight through                                `sample`
                Ã_ij = exp(P_ij) G_ij / Σ_k exp(P_ik) G_ik,  G_ij = 1 if i = j else D_j        `masked_attention`
    inference:  the ⌊ρ₁⋯ρ_s·N⌋ tokens of the highest keep score stay, the others are dropped   `drop`

The paper calls "keep" index 1 of π; its code, and this file, index 0.

Chapter: :doc:`/book/dynamicvit`
"""

import torch
import torch.nn.functional as F
from torch import nn

KEEP = 0


class ScorePredictor(nn.Module):
    """Log-probabilities of keeping and dropping each token, laid out as the official `PredictorLG`.

    Args:
        dim: C, channels of a token.
    """

    def __init__(self, dim, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.in_conv = nn.Sequential(nn.LayerNorm(dim, **dd), nn.Linear(dim, dim, **dd), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(dim, dim // 2, **dd), nn.GELU(),
            nn.Linear(dim // 2, dim // 4, **dd), nn.GELU(),
            nn.Linear(dim // 4, 2, **dd), nn.LogSoftmax(dim=-1),
        )  # fmt: skip

    def forward(self, x, alive=None):
        """Score patch tokens.

        Args:
            x: (B, n, C) patch tokens.
            alive: (B, n) mask of the tokens that still count in the global half; None counts all.

        Returns:
            (B, n, 2) log-probabilities, index 0 = keep.
        """
        u = self.in_conv(x)  # (B, n, C)
        local, glob = u.chunk(2, dim=-1)  # (B, n, C/2) each
        if alive is None:
            glob = glob.mean(dim=1, keepdim=True)  # (B, 1, C/2)
        else:
            alive = alive.unsqueeze(-1)  # (B, n, 1)
            glob = (glob * alive).sum(dim=1, keepdim=True) / alive.sum(dim=1, keepdim=True)
        return self.out_conv(torch.cat([local, glob.expand_as(local)], dim=-1))


def sample(log_probs, alive):
    """Draw the running keep mask D by the straight-through Gumbel-softmax.

    An image that would be left without a token keeps its best living one.

    Args:
        log_probs: (B, n, 2), index 0 = keep.
        alive: (B, n), D before this stage.

    Returns:
        (B, n): D after this stage, zeros and ones with the gradient of the soft sample.
    """
    keep = F.gumbel_softmax(log_probs, hard=True)[..., KEEP] * alive  # (B, n)
    empty = keep.sum(dim=1, keepdim=True) < 0.5  # (B, 1)
    best = log_probs[..., KEEP].masked_fill(alive < 0.5, float("-inf")).argmax(dim=1)  # (B,)
    return keep + empty * F.one_hot(best, keep.shape[1])


def masked_attention(keep):
    """The additive attention bias log G that hides dropped tokens from the others.

    Added to the logits before the softmax it gives Ã. The small constant lets the gradient reach the decisions of
    dropped tokens: it stands for e^P times 1e-20 there, where the official code adds 1e-6 / N.

    Args:
        keep: (B, T) mask over all tokens, prefix tokens 1.

    Returns:
        (B, 1, T, T) float32, for timm's `attn_mask`.
    """
    eye = torch.eye(keep.shape[1], device=keep.device)
    g = keep[:, None, None, :] * (1 - eye) + eye  # (B, 1, T, T)
    return (g.float() + 1e-20).log()


def drop(x, kept):
    """Keep the chosen tokens and drop the others.

    Args:
        x: (B, n, C) or (B, n).
        kept: (B, k) int64, positions in x.

    Returns:
        (B, k, C) or (B, k), in the order of `kept`.
    """
    return x.gather(1, kept if x.dim() == 2 else kept.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
