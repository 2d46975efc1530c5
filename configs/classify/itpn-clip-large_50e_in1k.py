"""iTPN-L after pre-training on CLIP: 50 epochs, layer decay 0.55."""

from itpn.recipes.classify import itpn_clip

config = itpn_clip(size="large")
