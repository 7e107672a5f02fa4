"""The one error a user can cause: a single line that says what was got, what is allowed and how to mend it."""


class InputError(ValueError):
    """Bad input. The message is one line: what was got, what is allowed, the fix. Commands print it and exit 2."""
