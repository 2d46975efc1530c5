"""iTPN-L on CLIP B/16, the authors' size, 300 epochs: 307.06 M, 61.19 GMAC. The paper: 87.0 %."""

from itpn.recipes.distill import itpn_clip

config = itpn_clip(size="large", teacher="b", epochs=300)
