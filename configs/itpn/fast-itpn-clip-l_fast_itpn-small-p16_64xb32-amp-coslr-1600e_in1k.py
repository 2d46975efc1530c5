"""Fast-iTPN-S on CLIP L/14. The paper: 86.4 % top-1."""

from itpn.recipes.distill import fast_itpn_clip

config = fast_itpn_clip(size="small", epochs=1600)
