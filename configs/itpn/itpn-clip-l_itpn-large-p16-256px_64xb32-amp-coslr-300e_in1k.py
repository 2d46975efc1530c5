"""iTPN-L on CLIP L/14 at 256 pixels. The paper: 88.0 % top-1."""

from itpn.recipes.distill import itpn_clip

config = itpn_clip(size="large", teacher="l", epochs=300, image_size=256)
