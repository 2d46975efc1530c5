"""UPerNet on iTPN-B after pre-training on CLIP: ADE20K, crops of 512 pixels."""

from itpn.recipes.segment import upernet

config = upernet(pretrained="clip", size="base")
