"""Fast-iTPN, tiny, at 512 pixels."""

from itpn.recipes.classify import fast_itpn

config = fast_itpn(size="tiny", image_size=512)
