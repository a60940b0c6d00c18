"""On real photographs the engine gives the official EViT code's accuracy. Needs TPBOOK_DATA and TPBOOK_WEIGHTS."""

import os

import pytest
import torch
from torch.utils.data import DataLoader

import tpbook
from tpbook import data

there = os.path.isdir(os.path.join(os.environ.get("TPBOOK_DATA", "-"), data.NIPS)) and os.path.isfile(
    os.path.join(os.environ.get("TPBOOK_WEIGHTS", "-"), "deit_tiny_patch16_224.safetensors")
)


@pytest.mark.slow
@pytest.mark.skipif(not there, reason="needs TPBOOK_DATA and TPBOOK_WEIGHTS")
@torch.inference_mode()
def test_evit_without_training():
    """fixtures/README.md of the shared data: dense 84.9 %, EViT 79.8 % at ρ = 0.7 and 38.8 % at 0.3."""
    model = tpbook.load_backbone("deit_tiny_patch16_224")
    photographs = DataLoader(data.nips2017_dev(data.eval_transform(model)), batch_size=50)
    right = {1.0: 0, 0.7: 0, 0.3: 0}
    tpbook.prune(model, "evit")
    for images, labels in photographs:
        for ratio in right:
            model.keep_ratio = ratio
            right[ratio] += (model(images).argmax(1) == labels).sum().item()
    percent = {ratio: 100 * n / len(photographs.dataset) for ratio, n in right.items()}
    assert percent == pytest.approx({1.0: 84.9, 0.7: 79.8, 0.3: 38.8}, abs=0.3)
