"""Mask R-CNN on iTPN-B pre-trained on pixels."""

from itpn.recipes.detect import mask_rcnn

config = mask_rcnn(pretrained="pixel", size="base", epochs=12)
