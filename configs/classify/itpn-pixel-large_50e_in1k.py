"""iTPN-L after pre-training on pixels: layer decay 0.55."""

from itpn.recipes.classify import itpn_pixel

config = itpn_pixel(size="large")
