"""iTPN on pixels and features (MFM), HiViT-L (mmpretrain)."""

from itpn.recipes.pretrain import mmpretrain_pixel

config = mmpretrain_pixel(size="large", epochs=800, feature_weight=0.3)
