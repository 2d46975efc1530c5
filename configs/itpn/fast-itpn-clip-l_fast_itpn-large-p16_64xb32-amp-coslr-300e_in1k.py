"""Fast-iTPN-L on CLIP L/14."""

from itpn.recipes.distill import fast_itpn_clip

config = fast_itpn_clip(size="large", epochs=300)
