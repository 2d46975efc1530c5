"""Fast-iTPN-L on CLIP L/14, 300 epochs: 319.32 M, 65.93 GMAC."""

from itpn.recipes.distill import fast_itpn_clip

config = fast_itpn_clip(size="large", epochs=300)
