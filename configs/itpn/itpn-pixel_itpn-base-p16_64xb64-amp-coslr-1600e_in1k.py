"""iTPN-B on pixels, the authors' size. The paper: 85.5 % top-1."""

from itpn.recipes.pretrain import itpn_pixel

config = itpn_pixel(size="base", epochs=1600)
