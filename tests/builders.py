"""Small random models of every family, for tests that run over all of them.

`BUILDERS`: name → function () → (model in eval mode, images that it takes). Norms, LayerScale, biases and position
tables are far from their trivial start, so that a part that is left out shows.
"""

import pytest
import timm
import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit

import tpbook
from tpbook.backbones import PSViT, T2TViT
from tpbook.methods import METHODS

SIZE = (64, 80)  # 4 × 5 patches of 16 × 16
BUILDERS = {}
COUNTED = [name for name, method in METHODS.items() if method.chooses.counted]  # those that a keep ratio drives


def builder(function):
    """Add a function () → (model, images) to `BUILDERS`, by its name."""
    BUILDERS[function.__name__] = function
    return function


def lively(model, size=SIZE, batch=2):
    """The model with random parameters in eval mode, and a batch of images of that size."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "bias_table" in name:
                p.normal_(std=1.0)
            elif "freqs" in name:  # of a rotation, in radians a patch
                p.uniform_(-1.5, 1.5)
            elif p.dim() == 1:
                p.uniform_(0.2, 0.8)
            else:
                p.normal_(std=0.2)
    return model.eval(), torch.randn(batch, 3, *size)


def learning(model):
    """The model in training mode, with BatchNorm's statistics of old and no dropout: no image depends on the others."""
    for module in model.train().modules():
        if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.Dropout)):
            module.eval()
    return model


def answer(model, images):
    """What a model says of images, a tensor whatever its library wraps it in: logits, or the pooled embedding."""
    out = model(images)
    if isinstance(out, torch.Tensor):
        return out
    return next(out[name] for name in ("logits", "cls_logits", "image_embeds", "pooler_output") if name in out)


def _timm(name, **kwargs):
    small = {"img_size": SIZE, "patch_size": 16, "embed_dim": 32, "num_heads": 2, "depth": 3, "num_classes": 10}
    return lively(timm.create_model(name, **{**small, **kwargs}))


def _eva(**kwargs):
    return lively(Eva(img_size=SIZE, embed_dim=32, num_heads=2, depth=3, num_classes=10, **kwargs))


def _beit(**kwargs):
    return lively(Beit(img_size=SIZE, embed_dim=32, num_heads=2, depth=3, num_classes=10, init_values=0.1, **kwargs))


def _naflex(**kwargs):
    small = {"embed_dim": 32, "num_heads": 2, "depth": 3, "num_classes": 10, "pos_embed_grid_size": (4, 5)}
    return lively(NaFlexVit(**small, **kwargs))


@builder
def vit():
    return _timm("vit_tiny_patch16_224")


@builder
def vit_registers():
    return _timm("vit_small_patch14_reg4_dinov2", qk_norm=True)  # LayerScale, four registers


@builder
def lvvit():
    """A stem with BatchNorm, whose statistics are no trivial ones; two heads."""
    model, images = lively(tpbook.LVViT(SIZE, embed_dim=32, depth=3, num_heads=2, num_classes=10, stem_width=8))
    for name, statistics in model.named_buffers():
        if statistics.is_floating_point():
            statistics.uniform_(*((0.5, 2.0) if "var" in name else (-0.5, 0.5)))
    return model, images


@builder
def t2t_performer():
    return lively(T2TViT(SIZE, embed_dim=32, depth=3, num_heads=2, num_classes=10, token_dim=8))


@builder
def t2t_transformer():
    """Its blocks attend by another scale."""
    small = {"embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 10, "token_dim": 8}
    return lively(T2TViT(SIZE, tokens_type="transformer", qk_scale=32**-0.5, **small))


@builder
def ps_vit():
    """Two iterations, which move the points, and three blocks."""
    small = {"embed_dim": 64, "depth": 5, "iterations": 2, "num_heads": 2, "num_classes": 10, "stem_width": 64}
    model, images = lively(PSViT(SIZE, points=(4, 5), **small))
    for module in model.stem.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5), module.running_var.uniform_(0.5, 2.0)
    return model, images


@builder
def eva_abs():
    """EVA-01: no rotation."""
    return _eva()


@builder
def eva_split():
    """EVA-02 T and S: q, k, v apart, SwiGLU, a norm in the MLP."""
    return _eva(
        qkv_fused=False, swiglu_mlp=True, scale_mlp=True, use_rot_pos_emb=True, ref_feat_shape=(3, 3),
    )  # fmt: skip


@builder
def eva_fused():
    """EVA-02 B and L: one qkv, whose biases are added apart; a norm in the attention."""
    model, images = _eva(
        swiglu_mlp=True, scale_attn_inner=True, use_rot_pos_emb=True, global_pool="token", init_values=0.1,
    )  # fmt: skip
    for block in model.blocks:
        block.attn.qkv_bias_separate = True
    return model, images


@builder
def eva_mixed():
    """RoPE-ViT: each head of each block has its own rotation."""
    return _eva(
        attn_type="rope", use_rot_pos_emb=True, rope_type="mixed", rope_grid_indexing="xy", init_values=0.1,
    )  # fmt: skip


@builder
def eva_dinov3():
    return _eva(
        use_rot_pos_emb=True, rope_type="dinov3", rope_rotate_half=True, rope_temperature=100, num_reg_tokens=4,
        use_abs_pos_emb=False, qkv_bias=False, init_values=0.1, use_fc_norm=False, dynamic_img_size=True,
    )  # fmt: skip


@builder
def eva_pe():
    """PE: a norm before the blocks, attention pooling that reads the class token too."""
    return _eva(
        attn_type="rope", use_rot_pos_emb=True, rope_grid_offset=1.0, rope_grid_indexing="xy", global_pool="map",
        use_pre_transformer_norm=True, use_fc_norm=False, attn_pool_num_heads=2, attn_pool_mlp_ratio=2.0,
    )  # fmt: skip


@builder
def eva_grouped():
    """Sapiens2: two query heads share a key, q/k norm, LayerScale on the attention alone."""
    return _eva(
        attn_type="rope", use_rot_pos_emb=True, rope_type="dinov3", rope_rotate_half=True, qkv_fused=False,
        num_kv_heads=(2, 1, 1), qk_norm=True, init_values=0.1, attn_only_layer_scale=True, num_reg_tokens=2,
    )  # fmt: skip


@builder
def eva_mrope():
    """LingBot's kind: sections of the rotation; no class token."""
    return _eva(
        attn_type="rope", use_rot_pos_emb=True, rope_type="mrope", rope_mrope_section=(2, 3, 3), class_token=False,
        use_abs_pos_emb=False,
    )  # fmt: skip


@builder
def beit():
    """A bias table in each block."""
    return _beit(use_rel_pos_bias=True)


@builder
def beit_shared():
    """One bias table for all blocks."""
    return _beit(use_shared_rel_pos_bias=True, swiglu_mlp=True, scale_mlp=True, global_pool="token")


@builder
def beit_plain():
    """No bias at all."""
    return _beit()


@builder
def naflex():
    """timm's `Block`; no class token."""
    return _naflex(reg_tokens=1, global_pool="avg", init_values=0.1)


@builder
def naflex_map():
    return _naflex(class_token=True, global_pool="map", pool_include_prefix=True, embed_proj_type="conv")


@builder
def naflex_rope():
    """timm's `EvaBlock`, gated."""
    return _naflex(
        class_token=True, global_pool="token", rope_type="axial", rope_ref_feat_shape=(3, 3), attn_gated=True,
        pos_embed="none",
    )  # fmt: skip


@builder
def naflex_mixed():
    return _naflex(class_token=True, reg_tokens=2, global_pool="avg", rope_type="mixed", pos_embed="factorized")


# ---------------------------------------------------------------------------- other libraries
# A test of one that is not installed is skipped. Most of them know square images alone.


def _transformers(name, vision=False, **config):
    """A model of transformers by its class; `vision`: its configuration holds one of the image tower."""
    cls = getattr(pytest.importorskip("transformers"), name)
    small = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 64,
        "patch_size": 16, **config,
    }  # fmt: skip
    config = {"vision_config": small} if vision else small
    return lively(cls(cls.config_class(num_labels=10, **config)), (64, 64))


@builder
def hf_vit():
    return _transformers("ViTForImageClassification")


@builder
def hf_vit_base():
    """No head but a pooler."""
    return _transformers("ViTModel")


@builder
def hf_deit():
    """Two prefix tokens, two heads."""
    return _transformers("DeiTForImageClassificationWithTeacher")


@builder
def hf_dinov2():
    """The head reads the mean of the patches too."""
    return _transformers("Dinov2ForImageClassification", layerscale_value=0.5, mlp_ratio=2)


@builder
def hf_dinov2_registers():
    return _transformers(
        "Dinov2WithRegistersForImageClassification", num_register_tokens=3, use_swiglu_ffn=True, mlp_ratio=2,
    )  # fmt: skip


@builder
def hf_dinov3():
    settled = {"pos_embed_rescale": None}  # in training the positions are drawn at random otherwise
    model, _ = _transformers("DINOv3ViTModel", image_size=SIZE, num_register_tokens=4, use_gated_mlp=True, **settled)
    return model, torch.randn(2, 3, *SIZE)


@builder
def hf_clip():
    return _transformers("CLIPVisionModelWithProjection", projection_dim=8)


@builder
def hf_clip_classifier():
    """The mean of the patches that the last layer gives, without a norm."""
    return _transformers("CLIPForImageClassification", vision=True)


@builder
def hf_siglip():
    """No class token, an attention pool."""
    return _transformers("SiglipVisionModel")


@builder
def hf_siglip_classifier():
    return _transformers("SiglipForImageClassification", vision=True)


@builder
def hf_timm_wrapper():
    transformers = pytest.importorskip("transformers")
    small = {"img_size": 64, "embed_dim": 32, "num_heads": 2, "depth": 4, "global_pool": "avg"}
    config = transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=small, num_labels=10)
    return lively(transformers.TimmWrapperForImageClassification(config), (64, 64))


@builder
def torchvision_vit():
    vision_transformer = pytest.importorskip("torchvision.models.vision_transformer")
    model = vision_transformer.VisionTransformer(
        image_size=64, patch_size=16, num_layers=4, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10
    )
    return lively(model, (64, 64))


def _open_clip(**kwargs):
    transformer = pytest.importorskip("open_clip.transformer")
    small = {"image_size": SIZE, "patch_size": 16, "width": 32, "layers": 4, "heads": 2, "mlp_ratio": 2}
    return lively(transformer.VisionTransformer(output_dim=8, **small, **kwargs))


@builder
def open_clip_vit():
    return _open_clip(ls_init_value=0.5)


@builder
def open_clip_average():
    """Custom blocks; the norm after the pool."""
    return _open_clip(pool_type="avg", final_ln_after_pool=True, qk_norm=True, scale_heads=True)


@builder
def open_clip_timm():
    timm_model = pytest.importorskip("open_clip.timm_model")
    model = timm_model.TimmModel("vit_tiny_patch16_224", embed_dim=8, image_size=224, pool="token")
    model.trunk, model.head.proj = _timm("vit_tiny_patch16_224", num_classes=0)[0], torch.nn.Linear(32, 8)
    return lively(model)
