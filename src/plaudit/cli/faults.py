"""What a fault means to the user who met it: one line each, in plain words; None for what is a fault of the program."""

import errno
import importlib.metadata
import re

from cyclopts import CycloptsError, UnusedCliTokensError

FILE_FAULTS = {
    errno.EACCES: "permission denied; name another place, or get the right to write (or read) there",
    errno.EPERM: "not permitted by the system; name another place",
    errno.EROFS: "this file system is read-only; name another place",
    errno.ENOSPC: "the disk is full; make room, or name another place",
    errno.EDQUOT: "the quota of disk space is used up; make room, or name another place",
    errno.ENOTDIR: "a part of this path is a file, not a folder; name another place",
    errno.EEXIST: "there is a file where a folder is needed; name another place",
    errno.EISDIR: "this is a folder; name a file",
    errno.ENOENT: "no such file or folder",
}
"""What the system says about a file, and what to do."""

MEMORY = (
    "out of memory: lower tokens_per_micro_batch (the result stays the same), max_rows or token_budget, switch on "
    "gradient_checkpointing, or take a smaller model; --dry-run estimates what a run needs"
)


def describe_fault(error: BaseException) -> list[str] | None:
    """The lines that tell a user what went wrong.

    Returns:
        One line per fault; None where nothing the user did explains the exception.
    """
    if isinstance(error, UnusedCliTokensError):
        words = " ".join(error.unused_tokens or ())
        return [f"'{words}': one word too many; options start with --, and --help lists them"]
    if isinstance(error, OSError) and error.filename is not None and error.errno in FILE_FAULTS:
        return [f"{_without_temporary_name(str(error.filename))}: {FILE_FAULTS[error.errno]}"]
    if isinstance(error, CycloptsError | ValueError | OSError):
        return str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, ImportError):
        return _missing_package(error)
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "not enough memory" in str(error)
    ):
        return [MEMORY]
    return None


def _without_temporary_name(path: str) -> str:
    """The file that was meant: results are written beside it first, as `.name.PROCESS.part`."""
    return re.sub(r"\.([^/]+)\.\d+\.part$", r"\1", path)


def _missing_package(error: ImportError) -> list[str] | None:
    if "pip install 'plaudit[" in str(error):
        return [str(error)]
    package = (error.name or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and package and (extra := extra_with(package)) is not None:
        return [f"this needs the package {package}: pip install 'plaudit[{extra}]'"]
    return None


def extra_with(package: str) -> str | None:
    """The first extra of this installation that brings a package."""
    for requirement in importlib.metadata.requires("plaudit") or ():
        wanted, _, condition = requirement.partition(";")
        extra = re.search(r"extra == ['\"]([^'\"]+)['\"]", condition)
        if extra and extra.group(1) not in ("dev", "test", "docs") and re.match(rf"{re.escape(package)}\b", wanted):
            return extra.group(1)
    return None
