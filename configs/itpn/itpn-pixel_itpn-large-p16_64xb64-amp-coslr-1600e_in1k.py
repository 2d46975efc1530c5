"""iTPN-L on pixels, the authors' size, 1600 epochs: 318.34 M, 61.19 GMAC. The paper: 86.7 %."""

from itpn.recipes.pretrain import itpn_pixel

config = itpn_pixel(size="large", epochs=1600)
