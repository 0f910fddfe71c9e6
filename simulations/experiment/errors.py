"""The exceptions that a simulation script reports in one line, without a traceback."""


class UserError(ValueError):
    """The input is invalid; the message names the option and says what to do."""


class FederationError(RuntimeError):
    """A simulated client failed, so the methods would no longer be compared on the same models."""
