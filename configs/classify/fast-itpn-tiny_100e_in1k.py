"""Fast-iTPN, tiny, at 224 pixels: 100 epochs, layer decay 0.80, a moving average."""

from itpn.recipes.classify import fast_itpn

config = fast_itpn(size="tiny")
