"""The error for invalid input: a single line that states what was given, what is allowed and how to fix it."""


class InputError(ValueError):
    """Invalid input. The message is one line: what was given, what is allowed, the fix. Commands exit with code 2."""
