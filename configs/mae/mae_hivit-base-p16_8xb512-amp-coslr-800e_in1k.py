"""MAE on HiViT-B, no pyramid. The paper: 84.2 % top-1."""

from itpn.recipes.pretrain import mae

config = mae(size="base", epochs=800)
