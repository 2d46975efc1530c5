"""iTPN on CLIP B/16, HiViT-B (mmpretrain), loss without lower bound.

Cross-entropy on raw features falls for ever, whether or not the student learns. To train, take the name
without -as-published.
"""

from itpn.recipes.distill import mmpretrain_clip

config = mmpretrain_clip(epochs=800, as_published=True)
