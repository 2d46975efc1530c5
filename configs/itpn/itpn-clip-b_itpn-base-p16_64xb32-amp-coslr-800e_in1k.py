"""iTPN-B on CLIP B/16, the authors' size. The paper: 86.2 % top-1."""

from itpn.recipes.distill import itpn_clip

config = itpn_clip(size="base", teacher="b", epochs=800)
