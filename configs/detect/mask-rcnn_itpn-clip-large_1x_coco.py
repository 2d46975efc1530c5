"""Mask R-CNN on iTPN-L pre-trained on CLIP: 12 epochs."""

from itpn.recipes.detect import mask_rcnn

config = mask_rcnn(pretrained="clip", size="large", epochs=12)
