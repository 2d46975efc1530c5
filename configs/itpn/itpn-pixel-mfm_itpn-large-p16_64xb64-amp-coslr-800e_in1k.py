"""iTPN-L on pixels and features (MFM), the authors' size."""

from itpn.recipes.pretrain import itpn_pixel

config = itpn_pixel(size="large", epochs=800, feature_weight=0.3)
