"""iTPN-B on pixels and features (MFM), the authors' size."""

from itpn.recipes.pretrain import itpn_pixel

config = itpn_pixel(size="base", epochs=800, feature_weight=0.3)
