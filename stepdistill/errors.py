"""The error for invalid input: a single line that states what was given, what is allowed and how to fix it."""


class InputError(ValueError):
    """Invalid input. The message is one line: what was given, what is allowed, the fix. Commands exit with code 2."""


def check_seed(seed: int) -> None:
    """Raises InputError if a seed is not a signed integer of 64 bits, which is what torch takes."""
    if not -(2**63) <= seed < 2**63:
        raise InputError(f"seed: got {seed}; allowed: -2^63 to below 2^63; try 0")
