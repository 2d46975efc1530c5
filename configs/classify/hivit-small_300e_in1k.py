"""HiViT, small, from scratch (mmpretrain)."""

from itpn.recipes.classify import hivit

config = hivit(size="small")
