"""iTPN-B after pre-training on CLIP: layer decay 0.60."""

from itpn.recipes.classify import itpn_clip

config = itpn_clip(size="base")
