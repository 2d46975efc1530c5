"""iTPN-L on CLIP L/14 at 256 pixels, 300 epochs: 307.62 M, 80.87 GMAC. The paper: 88.0 %."""

from itpn.recipes.distill import itpn_clip

config = itpn_clip(size="large", teacher="l", epochs=300, image_size=256)
