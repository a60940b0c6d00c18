"""The embedded data set: real handwritten digits, each somewhere on a cluttered canvas.

scikit-learn's 1,797 digits of 8 × 8 pixels are split into train and test first. Each is then enlarged and placed at a
random spot of a 56 × 56 canvas, among fragments of other digits of the same split and noise. Cut into patches of 4 × 4
pixels a canvas has 14 × 14 = 196 of them, as many as a 224 px photograph has patches of 16, so every keep ratio means
the papers' token counts; and which patches carry the digit is known. No fragment covers the digit: it clears the square
it stands in, so an empty square is a weak hint of where it is.

Chapter: :doc:`/book/a-tour-of-keep-ratios`
"""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

SIZE, PATCH = 56, 4  # pixels
GRID = SIZE // PATCH
MEAN, STD = 0.09, 0.18  # of the pixels of a canvas, before normalisation
SPLITS = ("train", "test")
FRAGMENTS = 10  # distractors a canvas, unless said otherwise


class Digits(TensorDataset):
    """Canvases with their digit and where it is. Items are `(image, label)`.

    Attributes:
        images: (n, 1, 56, 56) float32, normalised by `MEAN` and `STD`.
        labels: (n,) int64, 0 to 9.
        digit_patches: (n, 196) bool, the patches that ink of the digit touches.
    """

    def __init__(self, images, labels, digit_patches):
        super().__init__(images, labels)
        self.images, self.labels, self.digit_patches = images, labels, digit_patches


def digits(split="test", *, seed=0, per_digit=1, fragments=FRAGMENTS):
    """Place every digit of a split on canvases of its own.

    Args:
        split: "train" (1,000 digits) or "test" (797).
        seed: draws spots, scales, contrast and clutter; the same seed gives the same canvases.
        per_digit: canvases a digit.
        fragments: distractors a canvas.

    Returns:
        Digits: digit after digit, `per_digit` canvases each.

    Raises:
        ValueError: `split` is neither "train" nor "test", `per_digit` is less than 1 or `fragments` less than 0.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if per_digit < 1:
        raise ValueError(f"per_digit must be at least 1, got {per_digit!r}")
    if fragments < 0:
        raise ValueError(f"fragments must be at least 0, got {fragments!r}")
    canvases, labels, patches = _drawn(split, seed, per_digit, fragments)
    return Digits((canvases - MEAN) / STD, labels.clone(), patches.clone())


@functools.lru_cache(maxsize=4)  # trainings that are compared see the same canvases; 4,000 are 50 MB
def _drawn(split, seed, per_digit, fragments):
    """Canvases (n, 1, 56, 56) in [0, 1], labels (n,), and the digits' patches (n, 196); not to be written into."""
    glyphs, labels = _glyphs(split)
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    order = np.repeat(np.arange(len(glyphs)), per_digit)
    canvases = np.empty((len(order), SIZE, SIZE), np.float32)
    patches = np.empty((len(order), GRID * GRID), bool)
    for i, which in enumerate(order):
        canvases[i], patches[i] = _canvas(glyphs, which, fragments, rng)
    return torch.from_numpy(canvases)[:, None], torch.from_numpy(labels[order]), torch.from_numpy(patches)


@functools.cache
def _glyphs(split):
    """The split's digits: {side: (n, side, side)} enlarged once for every side in use, and their labels (n,)."""
    from sklearn.datasets import load_digits  # slow to load, and wanted by who draws canvases alone
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    parts = train_test_split(raw.images / 16, raw.target, train_size=1000, random_state=0, stratify=raw.target)
    small, labels = parts[SPLITS.index(split)], parts[2 + SPLITS.index(split)]
    small = torch.from_numpy(small).float()[:, None]
    sides = {s: F.interpolate(small, (s, s), mode="bilinear").squeeze(1).numpy() for s in range(16, 29, 2)}
    return _Sides(sides), labels.astype(np.int64)


class _Sides(dict):
    def __len__(self):
        return len(next(iter(self.values())))


def _canvas(glyphs, which, fragments, rng):
    """One canvas (56, 56) in [0, 1] and its digit's patches (196,)."""
    canvas, sides = np.zeros((SIZE, SIZE), np.float32), list(glyphs)
    side = sides[rng.integers(len(sides))]
    top, left = rng.integers(0, SIZE - side + 1, 2)
    glyph = glyphs[side][which]
    # fragments: pieces of other digits too small to read
    for _ in range(fragments):
        source = glyphs[sides[rng.integers(len(sides))]][rng.integers(len(glyphs))]
        piece = int(rng.integers(5, 9))
        y, x = rng.integers(0, source.shape[0] - piece + 1, 2)
        v, u = rng.integers(0, SIZE - piece + 1, 2)
        canvas[v : v + piece, u : u + piece] = np.maximum(
            canvas[v : v + piece, u : u + piece], rng.uniform(0.5, 1) * source[y : y + piece, x : x + piece]
        )
    # the digit clears its place, so that clutter surrounds it and never covers it
    spot = canvas[top : top + side, left : left + side]
    spot[:] = rng.uniform(0.7, 1) * glyph
    ink = np.zeros((SIZE, SIZE), bool)
    ink[top : top + side, left : left + side] = glyph > 0.2
    canvas += rng.normal(0, 0.05, canvas.shape).astype(np.float32)
    patches = ink.reshape(GRID, PATCH, GRID, PATCH).any(axis=(1, 3)).reshape(-1)
    return canvas.clip(0, 1), patches
