"""iTPN-L on pixels, the authors' size. The paper: 86.3 % top-1."""

from itpn.recipes.pretrain import itpn_pixel

config = itpn_pixel(size="large", epochs=400)
