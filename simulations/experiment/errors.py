"""The one exception that a simulation script shows its user without a traceback."""


class UserError(ValueError):
    """A wrong input, told to the user in one line."""
