"""iTPN on pixels, HiViT-B (mmpretrain), 400 epochs: 102.68 M, 18.47 GMAC."""

from itpn.recipes.pretrain import mmpretrain_pixel

config = mmpretrain_pixel(size="base", epochs=400)
