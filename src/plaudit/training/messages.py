"""Where a run speaks: notes on the standard error stream, warnings loudly there and in the log."""

import logging
import sys

logger = logging.getLogger("plaudit")


def say(text: str) -> None:
    """Print one plain line to the standard error stream, so that the standard output stays for results."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def warn(text: str) -> None:
    """Print a warning that cannot be missed, and hand it to the `plaudit` logger for those who collect logs."""
    say(f"WARNING: {text}")
    logger.info("warning: %s", text)
