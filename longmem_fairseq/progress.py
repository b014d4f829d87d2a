"""Progress bars in terminals and notebooks, for work that takes longer than a moment."""

import sys

from tqdm import tqdm


def token_bar(total: int, description: str, delay: float = 1.0) -> tqdm:
    """Make a bar that counts tokens; it disappears at the end.

    Where standard error is a file there is no bar. In a notebook, whose standard error is not a terminal either, there
    is one.

    Args:
        total: Number of tokens at the end.
        description: Text in front of the bar.
        delay: Time in seconds before the bar appears.

    Returns:
        A context manager with ``update(tokens)``.
    """
    notebook = "ipykernel" in sys.modules
    return tqdm(
        total=total,
        desc=description,
        unit=" tokens",
        unit_scale=True,
        leave=False,
        disable=False if notebook else None,
        delay=delay,
    )
