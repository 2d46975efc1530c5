"""iTPN-B on pixels, the authors' size, 400 epochs: 108.49 M, 17.85 GMAC. The paper: 85.1 %."""

from itpn.recipes.pretrain import itpn_pixel

config = itpn_pixel(size="base", epochs=400)
