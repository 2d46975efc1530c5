"""The one exception a user should ever see, and how to show names that come from elsewhere."""


class UserError(ValueError):
    """Something the user can put right; the message names the cause and the cure in one line."""


def printable(text: object) -> str:
    """On one line, and harmless to a terminal: what does not print is escaped, as are names' odd bytes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
