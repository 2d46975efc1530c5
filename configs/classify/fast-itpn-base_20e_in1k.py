"""Fast-iTPN, base, at 224 pixels: 20 epochs, layer decay 0.90, a moving average."""

from itpn.recipes.classify import fast_itpn

config = fast_itpn(size="base")
