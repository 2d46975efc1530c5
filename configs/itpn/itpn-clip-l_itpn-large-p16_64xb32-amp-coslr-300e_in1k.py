"""iTPN-L on CLIP L/14, the authors' size. The paper: 87.8 % top-1."""

from itpn.recipes.distill import itpn_clip

config = itpn_clip(size="large", teacher="l", epochs=300)
