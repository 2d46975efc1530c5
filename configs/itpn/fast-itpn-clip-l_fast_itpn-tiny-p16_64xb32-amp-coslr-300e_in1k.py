"""Fast-iTPN-T on CLIP L/14."""

from itpn.recipes.distill import fast_itpn_clip

config = fast_itpn_clip(size="tiny", epochs=300)
