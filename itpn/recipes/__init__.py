"""Typed recipes: functions that return everything a run needs, and the config files that call them."""
