"""The folder of a run: whose it is, what of an older run may go, and that two runs never write into the same one."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from plaudit.configs.training import FolderConfig
from plaudit.training.checkpoints import holds_checkpoints
from plaudit.training.messages import say, warn
from plaudit.training.processes import Processes

RUN_ENTRIES = (
    *("checkpoints", "model", "models", "metrics.jsonl", "samples.jsonl"),
    *("configuration.yaml", "result.json", "tensorboard", "curve.csv", "curve.png", "video"),
    *("refresh", "reward-model"),
)
"""What a run writes into its folder; nothing else there is ever touched."""


@contextmanager
def output_folder(config: FolderConfig, processes: Processes) -> Iterator[None]:
    """Make the run's folder and keep other runs out of it, for the length of a block; the first process does.

    The kernel lets go of the folder when the process ends, however it ends.

    Raises:
        ValueError: as `prepare_output`, and if another run is in the folder.
    """
    with ExitStack() as held:

        def prepare() -> None:
            check_output(config)
            config.output.mkdir(parents=True, exist_ok=True)
            held.enter_context(claimed(config.output))
            prepare_output(config)

        processes.from_first(prepare)
        yield


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Lock a folder for this process, for the length of a block.

    Raises:
        ValueError: if another process (or another run of this one) has it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"output: another run is writing to {folder}; wait until it ends, or name another folder"
            ) from None
        except OSError as error:
            # Some network file systems cannot lock a folder.
            warn(f"output: {folder} cannot be locked ({error}), so take care that no other run writes there")
        yield
    finally:
        os.close(descriptor)


def prepare_output(config: FolderConfig) -> None:
    """Make the run's folder; an older run there is refused, removed or left to be resumed.

    What a run left that ended before its first checkpoint is removed, with a message.

    Raises:
        ValueError: if the folder cannot be one, or holds a run and neither `resume` nor `overwrite` was given.
    """
    present = check_output(config)
    if present and not config.resume:
        if not (config.overwrite or config.quiet):
            say(f"output: {config.output} holds a run without a checkpoint, which is removed ({', '.join(present)})")
        for name in present:
            path = config.output / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    config.output.mkdir(parents=True, exist_ok=True)


def check_output(config: FolderConfig) -> list[str]:
    """What of an older run stands in the output folder; raises as `prepare_output`, and changes nothing."""
    if config.output.exists() and not config.output.is_dir():
        raise ValueError(f"output: {config.output} is a file; name a folder")
    present = [name for name in RUN_ENTRIES if (config.output / name).exists()]
    if worth_keeping(config.output) and not (config.resume or config.overwrite):
        raise ValueError(
            f"output: {config.output} already holds a run ({', '.join(present)}); go on with it (--resume, or "
            "resume: true), throw it away (--overwrite, or overwrite: true), or name another folder"
        )
    return present


def worth_keeping(output: Path) -> bool:
    """Whether a run's folder holds a model, a result or a checkpoint, damaged ones included.

    Without them there is nothing to go on from: the run failed early, and starting again costs nothing.
    """
    return (output / "model").exists() or (output / "result.json").exists() or holds_checkpoints(output / "checkpoints")
