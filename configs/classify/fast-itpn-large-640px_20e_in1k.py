"""Fast-iTPN, large, at 640 pixels: 20 epochs, layer decay 0.95, a moving average."""

from itpn.recipes.classify import fast_itpn

config = fast_itpn(size="large", image_size=640)
