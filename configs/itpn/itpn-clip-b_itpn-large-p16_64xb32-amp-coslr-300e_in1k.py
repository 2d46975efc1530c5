"""iTPN-L on CLIP B/16, the authors' size. The paper: 87.0 % top-1."""

from itpn.recipes.distill import itpn_clip

config = itpn_clip(size="large", teacher="b", epochs=300)
