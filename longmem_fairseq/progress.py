"""Progress bars: in terminals and notebooks, for what takes longer than a moment."""

import sys

from tqdm import tqdm


def token_bar(total: int, what: str, delay: float = 1.0) -> tqdm:
    """A bar of tokens, used as a context; it shows after ``delay`` seconds and goes when it is done.

    Where the errors go to a file there is none; a notebook, whose errors are no terminal's either, has one.
    """
    notebook = "ipykernel" in sys.modules
    return tqdm(
        total=total,
        desc=what,
        unit=" tokens",
        unit_scale=True,
        leave=False,
        disable=False if notebook else None,
        delay=delay,
    )
