"""iTPN-L on pixels, the authors' size, 400 epochs: 318.34 M, 61.19 GMAC. The paper: 86.3 %."""

from itpn.recipes.pretrain import itpn_pixel

config = itpn_pixel(size="large", epochs=400)
