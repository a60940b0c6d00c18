"""Every token before every block of a model that is not pruned, for what is measured on them.

Chapter: :doc:`/book/are-tokens-redundant`
"""

import torch

from ..attention import AttentionMask


@torch.no_grad()
def streams(model, images, batch=50):
    """What enters each block, what leaves the last, and where the class token looks.

    The row of attention is heard through the mask argument of the block's own attention, as the engine hears it.

    Args:
        model: a timm ViT with a class token in front, not pruned.
        images: (n, C, H, W).
        batch: images a forward.

    Returns:
        (blocks + 1, n, prefix + N, C) tokens, before each block and before the last norm; (blocks, n, N) the class
        token's attention to patches, mean over heads; (n,) the classes that the model says.
    """
    depth, prefix, patches = len(model.blocks), model.num_prefix_tokens, model.patch_embed.num_patches
    stream = torch.empty(depth + 1, len(images), prefix + patches, model.embed_dim)
    rows, said = torch.empty(depth, len(images), patches), []

    def keep_input(module, args):
        stream[places[module], now] = args[0]

    def keep_row(block, args, out):
        mask = AttentionMask(args[0].dtype, queries="class")
        block.attn(block.norm1(args[0]), attn_mask=mask)
        rows[places[block], now] = mask.heard.row[:, prefix:]

    places = {module: b for b, module in enumerate([*model.blocks, model.norm])}
    hooks = [module.register_forward_pre_hook(keep_input) for module in places]
    hooks += [block.register_forward_hook(keep_row) for block in model.blocks]
    try:
        for now in torch.arange(len(images)).split(batch):
            said.append(model(images[now]).argmax(1))
    finally:
        for hook in hooks:
            hook.remove()
    return stream, rows, torch.cat(said)


def blocks(which):
    """Blocks in words: "block 3", "blocks 1, 2", "no block"."""
    return ("block " if len(which) == 1 else "blocks ") + ", ".join(map(str, which)) if which else "no block"
