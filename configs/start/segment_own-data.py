"""Images and label pictures of your own, from pre-trained weights: 16 crops a step."""

from itpn.recipes.segment import own_data

config = own_data(size="itpn_base", epochs=100)
