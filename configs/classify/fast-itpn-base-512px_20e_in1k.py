"""Fast-iTPN, base, at 512 pixels."""

from itpn.recipes.classify import fast_itpn

config = fast_itpn(size="base", image_size=512)
