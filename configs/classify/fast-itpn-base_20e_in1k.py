"""Fast-iTPN, base, at 224 pixels: layer decay 0.90, a moving average of the weights."""

from itpn.recipes.classify import fast_itpn

config = fast_itpn(size="base")
