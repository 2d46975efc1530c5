"""Fast-iTPN-T on CLIP L/14, 1600 epochs: 28.88 M, 5.37 GMAC. The paper: 85.1 %."""

from itpn.recipes.distill import fast_itpn_clip

config = fast_itpn_clip(size="tiny", epochs=1600)
