"""iTPN-B on CLIP L/14, the authors' size, 300 epochs: 89.00 M, 17.85 GMAC. The paper: 87.0 %."""

from itpn.recipes.distill import itpn_clip

config = itpn_clip(size="base", teacher="l", epochs=300)
