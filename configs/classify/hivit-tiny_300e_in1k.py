"""HiViT, tiny, from scratch (mmpretrain)."""

from itpn.recipes.classify import hivit

config = hivit(size="tiny")
