"""Fast-iTPN, large, at 640 pixels: layer decay 0.95, a moving average of the weights."""

from itpn.recipes.classify import fast_itpn

config = fast_itpn(size="large", image_size=640)
