"""The error that stops a run before the weights move."""


class NonFiniteError(ValueError):
    """A loss or gradient that is not finite; the weights are those before the step."""
