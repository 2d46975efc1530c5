"""iTPN-B after pre-training on pixels: layer decay 0.60."""

from itpn.recipes.classify import itpn_pixel

config = itpn_pixel(size="base")
