"""iTPN-L on CLIP L/14, the authors' size, 300 epochs: 307.45 M, 61.19 GMAC. The paper: 87.8 %."""

from itpn.recipes.distill import itpn_clip

config = itpn_clip(size="large", teacher="l", epochs=300)
