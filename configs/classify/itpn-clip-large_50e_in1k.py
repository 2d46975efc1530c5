"""iTPN-L after pre-training on CLIP: layer decay 0.55."""

from itpn.recipes.classify import itpn_clip

config = itpn_clip(size="large")
