"""The demo: a nano iTPN fine-tuned on the bundled sample."""

from itpn.recipes.classify import demo

config = demo(epochs=4)
