"""Two processes give the gradients that one process gives on the joint batch."""

import os

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import tpbook
from tpbook import losses
from tpbook.methods import dynamicvit

B, CASES = 8, ("dense", "evit", "etps", "masked", "dynamicvit", "dtps")


class Given(nn.Module):
    """Masks that were drawn beforehand, in place of `PatchMask`."""

    def __init__(self, visible):
        super().__init__()
        self.visible = visible  # (B, n)

    def forward(self, x):
        return torch.cat([x[:, :1], x[:, 1:].gather(1, self.visible[..., None].expand(-1, -1, x.shape[-1]))], dim=1)


def gradients(case, rank, world):
    """Gradients of one process's share; rank and world (0, 1) for the joint batch."""
    torch.manual_seed(0)
    model = timm.create_model(
        "deit_tiny_patch16_224", img_size=96, embed_dim=48, num_heads=3, depth=6, num_classes=10
    ).train()  # fmt: skip
    images, labels = torch.randn(B, 3, 96, 96), torch.randint(10, (B,))
    teacher, visible = torch.randn(B, 10), torch.rand(B, 36).argsort(1)[:, :18]
    given = [torch.rand(B, 36) < 0.7 for _ in range(3)]
    mine = slice(rank * B // world, (rank + 1) * B // world)

    if case == "masked":
        model.patch_drop = Given(visible[mine])
    elif case != "dense":
        tpbook.prune(model, case, keep_ratio=0.5)
    draws = iter([g[mine].float() for g in given])

    def sample(log_probs, alive):  # the given decisions, with the gradient of the probabilities
        p = log_probs[..., 0].exp()
        return (next(draws) - p.detach() + p) * alive

    dynamicvit.sample, original = sample, dynamicvit.sample
    forward = DistributedDataParallel(model) if world > 1 else model
    with tpbook.trace(model) as t:
        logits = forward(images[mine])
    dynamicvit.sample = original
    if case in ("dynamicvit", "dtps"):
        theirs = {"teacher_logits": teacher[mine], "teacher_features": torch.zeros(len(logits), 36, 48)}
        shares = (0.5, 0.25, 0.125)  # the token term is a mean over each process's own kept tokens, so it is left out
        loss = losses.dynamicvit(logits, t, labels[mine], **theirs, keep_ratios=shares, token_weight=0)["total"]
    else:
        loss = losses.classification(logits, labels[mine])["total"]
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    got = {case: gradients(case, rank, 2) for case in CASES}
    if rank == 0:
        torch.save(got, f"{folder}/gradients.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(work, (str(folder),), nprocs=2)
    return torch.load(folder / "gradients.pt")


@pytest.mark.parametrize("case", CASES)
def test_gradients(two, case):
    one = gradients(case, 0, 1)
    assert one.keys() == two[case].keys()
    for name, gradient in one.items():
        torch.testing.assert_close(two[case][name], gradient, atol=1e-6, rtol=1e-4)
    assert any(gradient.abs().max() > 1e-3 for gradient in one.values())
