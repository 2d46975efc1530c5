"""Fast-iTPN-B on CLIP L/14, 1600 epochs: 90.37 M, 19.15 GMAC. The paper: 87.4 %."""

from itpn.recipes.distill import fast_itpn_clip

config = fast_itpn_clip(size="base", epochs=1600)
