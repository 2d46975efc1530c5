"""UPerNet on iTPN-L after pre-training on pixels: ADE20K, crops of 512 pixels."""

from itpn.recipes.segment import upernet

config = upernet(pretrained="pixel", size="large")
