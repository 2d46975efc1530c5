"""The demo: a nano iTPN, pixels and features, on the bundled sample."""

from itpn.recipes.pretrain import demo

config = demo(epochs=15)
