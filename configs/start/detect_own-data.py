"""Images and a COCO instances file of your own, from pre-trained weights: boxes and masks."""

from itpn.recipes.detect import own_data

config = own_data()
