"""iTPN on CLIP B/16, HiViT-B (mmpretrain), 300 epochs: 83.70 M, 18.47 GMAC."""

from itpn.recipes.distill import mmpretrain_clip

config = mmpretrain_clip(epochs=300)
