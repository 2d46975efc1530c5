"""Fast-iTPN-T on CLIP L/14. The paper: 85.1 % top-1."""

from itpn.recipes.distill import fast_itpn_clip

config = fast_itpn_clip(size="tiny", epochs=1600)
