"""Fast-iTPN, small, at 384 pixels."""

from itpn.recipes.classify import fast_itpn

config = fast_itpn(size="small", image_size=384)
