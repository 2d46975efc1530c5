"""Fast-iTPN-B on CLIP L/14."""

from itpn.recipes.distill import fast_itpn_clip

config = fast_itpn_clip(size="base", epochs=300)
