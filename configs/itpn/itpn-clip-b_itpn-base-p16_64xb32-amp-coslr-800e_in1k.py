"""iTPN-B on CLIP B/16, the authors' size, 800 epochs: 88.74 M, 17.85 GMAC. The paper: 86.2 %."""

from itpn.recipes.distill import itpn_clip

config = itpn_clip(size="base", teacher="b", epochs=800)
