"""iTPN-B on CLIP L/14, the authors' size. The paper: 87.0 % top-1."""

from itpn.recipes.distill import itpn_clip

config = itpn_clip(size="base", teacher="l", epochs=300)
