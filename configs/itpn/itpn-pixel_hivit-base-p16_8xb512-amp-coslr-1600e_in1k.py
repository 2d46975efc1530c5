"""iTPN on pixels, HiViT-B (mmpretrain), 1600 epochs: 102.68 M, 18.47 GMAC."""

from itpn.recipes.pretrain import mmpretrain_pixel

config = mmpretrain_pixel(size="base", epochs=1600)
