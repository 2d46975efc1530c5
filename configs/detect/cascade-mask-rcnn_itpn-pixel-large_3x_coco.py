"""Cascade Mask R-CNN on iTPN-L pre-trained on pixels (ours)."""

from itpn.recipes.detect import cascade_mask_rcnn

config = cascade_mask_rcnn(pretrained="pixel", size="large")
