"""Short for mask-rcnn_itpn-pixel-base_1x_coco."""

from itpn.recipes.detect import mask_rcnn

config = mask_rcnn(pretrained="pixel", size="base", epochs=12)
