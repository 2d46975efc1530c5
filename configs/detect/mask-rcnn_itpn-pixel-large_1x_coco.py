"""Mask R-CNN on iTPN-L pre-trained on pixels: 12 epochs."""

from itpn.recipes.detect import mask_rcnn

config = mask_rcnn(pretrained="pixel", size="large", epochs=12)
