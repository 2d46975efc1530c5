"""Mask R-CNN on iTPN-B pre-trained on CLIP."""

from itpn.recipes.detect import mask_rcnn

config = mask_rcnn(pretrained="clip", size="base", epochs=36)
