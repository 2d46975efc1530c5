"""Class folders of your own, from pre-trained weights: 128 images a step, mild mixing."""

from itpn.recipes.classify import own_data

config = own_data(size="itpn_base", epochs=50)
