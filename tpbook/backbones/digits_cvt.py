"""A CvT of transformers, built and called as a timm model is; imported when one is made, as transformers is optional.

Chapter: :doc:`/book/hybrid-vits`
"""

from torch import nn
from transformers import CvtConfig, CvtForImageClassification


class DigitsCvT(CvtForImageClassification):
    """Two stages, strides 4 and 2, the class token in the second; gives plain logits (B, classes).

    Args:
        depth, embed_dim, num_heads: one a stage.
        in_chans, num_classes: as timm counts them; no classes, no classifier.
        drop_path_rate: stochastic depth, as transformers spreads it in either stage.
    """

    def __init__(self, *, depth, embed_dim, num_heads, in_chans=3, num_classes=1000, drop_path_rate=0.0):
        two = len(depth)
        super().__init__(CvtConfig(
            num_channels=in_chans, num_labels=num_classes, depth=depth, embed_dim=embed_dim, num_heads=num_heads,
            patch_sizes=(7, 3), patch_stride=(4, 2), patch_padding=(2, 1), cls_token=(False, True),
            mlp_ratio=(4.0,) * two, drop_rate=(0.0,) * two, attention_drop_rate=(0.0,) * two, qkv_bias=(True,) * two,
            drop_path_rate=(drop_path_rate,) * two, qkv_projection_method=("dw_bn",) * two, kernel_qkv=(3,) * two,
            padding_kv=(1,) * two, stride_kv=(2,) * two, padding_q=(1,) * two, stride_q=(1,) * two,
        ))  # fmt: skip

    @property
    def num_classes(self):
        """How many logits there are."""
        return self.num_labels

    def forward(self, pixel_values):
        """(B, 1, 56, 56) → (B, classes)."""
        return super().forward(pixel_values).logits

    def no_weight_decay(self):
        """The parameters that an optimiser should not decay: the class token."""
        return {name for name, _ in self.named_parameters() if name.endswith("cls_token")}

    def get_classifier(self):
        """The last layer."""
        return self.classifier

    def reset_classifier(self, num_classes):
        """Another last layer, with random weights."""
        self.num_labels = self.config.num_labels = num_classes
        self.classifier = nn.Linear(self.layernorm.normalized_shape[0], num_classes) if num_classes else nn.Identity()
