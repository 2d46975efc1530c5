"""Fast-iTPN-S on CLIP L/14, 1600 epochs: 44.56 M, 8.99 GMAC. The paper: 86.4 %."""

from itpn.recipes.distill import fast_itpn_clip

config = fast_itpn_clip(size="small", epochs=1600)
