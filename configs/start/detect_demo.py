"""The smallest detector: a nano iTPN on the bundled scenes."""

from itpn.recipes.detect import demo

config = demo()
