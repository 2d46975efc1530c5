"""iTPN on pixels and features (MFM), HiViT-B (mmpretrain)."""

from itpn.recipes.pretrain import mmpretrain_pixel

config = mmpretrain_pixel(size="base", epochs=800, feature_weight=0.3)
