"""A folder of images of your own: iTPN-B, pixels and features, 256 images a step."""

from itpn.recipes.pretrain import own_data

config = own_data(size="itpn_base", epochs=400)
