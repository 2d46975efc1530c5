"""MAE on HiViT-L, no pyramid, 400 epochs: 309.40 M, 63.98 GMAC."""

from itpn.recipes.pretrain import mae

config = mae(size="large", epochs=400)
