"""Fast-iTPN-L on CLIP L/14, 1600 epochs: 319.32 M, 65.93 GMAC. The paper: 89.5 % at 640 pixels."""

from itpn.recipes.distill import fast_itpn_clip

config = fast_itpn_clip(size="large", epochs=1600)
