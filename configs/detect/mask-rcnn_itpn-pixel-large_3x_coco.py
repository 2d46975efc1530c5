"""Mask R-CNN on iTPN-L pre-trained on pixels (ours)."""

from itpn.recipes.detect import mask_rcnn

config = mask_rcnn(pretrained="pixel", size="large", epochs=36)
