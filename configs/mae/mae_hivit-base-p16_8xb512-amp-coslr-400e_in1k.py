"""MAE on HiViT-B, no pyramid."""

from itpn.recipes.pretrain import mae

config = mae(size="base", epochs=400)
