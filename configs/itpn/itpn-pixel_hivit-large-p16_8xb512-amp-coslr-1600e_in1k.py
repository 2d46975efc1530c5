"""iTPN on pixels, HiViT-L (mmpretrain), 1600 epochs: 314.25 M, 63.98 GMAC."""

from itpn.recipes.pretrain import mmpretrain_pixel

config = mmpretrain_pixel(size="large", epochs=1600)
