"""Fast-iTPN-L on CLIP L/14. The paper: 89.5 % top-1 at 640 pixels."""

from itpn.recipes.distill import fast_itpn_clip

config = fast_itpn_clip(size="large", epochs=1600)
