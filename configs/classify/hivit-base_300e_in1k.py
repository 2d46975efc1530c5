"""HiViT, base, from scratch (mmpretrain)."""

from itpn.recipes.classify import hivit

config = hivit(size="base")
