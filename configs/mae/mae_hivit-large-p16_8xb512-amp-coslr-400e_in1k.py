"""MAE on HiViT-L, no pyramid."""

from itpn.recipes.pretrain import mae

config = mae(size="large", epochs=400)
