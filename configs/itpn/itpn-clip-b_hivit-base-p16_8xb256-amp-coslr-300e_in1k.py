"""iTPN on CLIP B/16, HiViT-B (mmpretrain)."""

from itpn.recipes.distill import mmpretrain_clip

config = mmpretrain_clip(epochs=300)
