"""Fast-iTPN-B on CLIP L/14, 300 epochs: 90.37 M, 19.15 GMAC."""

from itpn.recipes.distill import fast_itpn_clip

config = fast_itpn_clip(size="base", epochs=300)
