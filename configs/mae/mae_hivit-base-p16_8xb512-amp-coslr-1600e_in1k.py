"""MAE on HiViT-B, no pyramid, 1600 epochs: 98.07 M, 18.47 GMAC."""

from itpn.recipes.pretrain import mae

config = mae(size="base", epochs=1600)
