"""The one exception the preprocessing scripts show to their user."""


class InputError(ValueError):
    """What the user gave cannot be used; the message is one sentence naming the value, the limit and the option."""
