"""Fast-iTPN-B on CLIP L/14. The paper: 87.4 % top-1."""

from itpn.recipes.distill import fast_itpn_clip

config = fast_itpn_clip(size="base", epochs=1600)
