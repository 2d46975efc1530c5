"""MAE on HiViT-B, no pyramid, 800 epochs: 98.07 M, 18.47 GMAC. The paper: 84.2 %."""

from itpn.recipes.pretrain import mae

config = mae(size="base", epochs=800)
