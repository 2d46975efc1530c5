"""Fast-iTPN, tiny, at 384 pixels: 100 epochs."""

from itpn.recipes.classify import fast_itpn

config = fast_itpn(size="tiny", image_size=384)
