"""Images and a COCO instances file of your own: boxes and masks."""

from itpn.recipes.detect import own_data

config = own_data()
