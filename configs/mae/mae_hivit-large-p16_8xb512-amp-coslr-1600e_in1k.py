"""MAE on HiViT-L, no pyramid, 1600 epochs: 309.40 M, 63.98 GMAC. The paper: 86.1 %."""

from itpn.recipes.pretrain import mae

config = mae(size="large", epochs=1600)
