"""iTPN on CLIP B/16, HiViT-B (mmpretrain).

The loss is the negative cosine. mmpretrain's config of this name has cross-entropy on raw features, which
has no lower bound; -as-published keeps it.
"""

from itpn.recipes.distill import mmpretrain_clip

config = mmpretrain_clip(epochs=800)
