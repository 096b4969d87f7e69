"""What a run of a study takes from its machine."""

import resource
import time
from contextlib import suppress

import psutil


def processor_seconds() -> float:
    """Of this process and of those that it started, whether they have ended or not."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = time.process_time() + ended.ru_utime + ended.ru_stime
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            spent += times.user + times.system
    return spent


def peak_memory() -> float:
    """Largest resident memory of this process so far, and of the largest that it started and that has ended, in MiB."""
    return sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024
