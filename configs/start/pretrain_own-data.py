"""For a folder of your own images: iTPN-B, pixels and features, 256 images a step, 400 epochs."""

from itpn.recipes.pretrain import own_data

config = own_data(size="itpn_base", epochs=400)
