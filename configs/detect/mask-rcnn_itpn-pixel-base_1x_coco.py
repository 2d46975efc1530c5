"""Mask R-CNN on iTPN-B pre-trained on pixels: 12 epochs."""

from itpn.recipes.detect import mask_rcnn

config = mask_rcnn(pretrained="pixel", size="base", epochs=12)
