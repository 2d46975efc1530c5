"""The one exception a user should ever see."""


class UserError(ValueError):
    """Something the user can put right; the message names the cause and the cure in one line."""
