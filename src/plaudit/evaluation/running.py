"""What the jobs of this room share while they run: a device, and words about how far they are."""

import sys


def pick_device(name: str) -> str:
    """The device to run on; `auto` takes an accelerator where there is one.

    Raises:
        ValueError: if there is no such device here.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: {name!r} cannot be used here ({reason[:80]}); use 'cpu' or 'auto'") from error
    return name


class Progress:
    """Says on stderr how far a job is, once per tenth."""

    def __init__(self, name: str, total: int, what: str) -> None:
        """A job on `total` things; `what` is said of them, such as `prompts scored`."""
        self.name, self.total, self.what, self.done = name, total, what, 0

    def __call__(self, count: int) -> None:
        """So many more are done."""
        before, self.done = self.done, self.done + count
        if 10 * before // self.total != 10 * self.done // self.total:
            sys.stderr.write(f"{self.name}: {self.done:,} of {self.total:,} {self.what}\n")


def say(text: str) -> None:
    """One line, or several, of what was found."""
    sys.stdout.write(text + "\n")
