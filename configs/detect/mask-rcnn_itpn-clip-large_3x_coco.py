"""Mask R-CNN on iTPN-L pre-trained on CLIP (ours)."""

from itpn.recipes.detect import mask_rcnn

config = mask_rcnn(pretrained="clip", size="large", epochs=36)
