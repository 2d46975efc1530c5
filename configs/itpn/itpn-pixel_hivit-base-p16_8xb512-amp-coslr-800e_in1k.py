"""iTPN on pixels, HiViT-B (mmpretrain)."""

from itpn.recipes.pretrain import mmpretrain_pixel

config = mmpretrain_pixel(size="base", epochs=800)
