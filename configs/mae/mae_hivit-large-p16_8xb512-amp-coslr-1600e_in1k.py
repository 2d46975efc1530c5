"""MAE on HiViT-L, no pyramid. The paper: 86.1 % top-1."""

from itpn.recipes.pretrain import mae

config = mae(size="large", epochs=1600)
