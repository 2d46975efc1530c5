"""iTPN on pixels, HiViT-L (mmpretrain)."""

from itpn.recipes.pretrain import mmpretrain_pixel

config = mmpretrain_pixel(size="large", epochs=400)
