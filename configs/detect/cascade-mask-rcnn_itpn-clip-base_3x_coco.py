"""Cascade Mask R-CNN on iTPN-B pre-trained on CLIP: 36 epochs."""

from itpn.recipes.detect import cascade_mask_rcnn

config = cascade_mask_rcnn(pretrained="clip", size="base")
