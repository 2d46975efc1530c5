"""HiViT, tiny, from scratch (mmpretrain): 300 epochs."""

from itpn.recipes.classify import hivit

config = hivit(size="tiny")
