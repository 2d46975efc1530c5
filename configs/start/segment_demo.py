"""A nano iTPN with a narrow UPerNet on the bundled scenes."""

from itpn.recipes.segment import demo

config = demo()
