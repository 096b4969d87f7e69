"""Turn-taking between training processes: one optimizer step each, by word from outside, timed where it runs.

A worker trains with whatever loop it has and knows nothing of the others. Two hooks that torch calls around every
optimizer step are all there is: the first step is the warm-up, during which gradients may be kept; from then on the
hook behind a step reports how long it took and waits for the next word. So a time is that of everything between the end
of one optimizer step and the end of the next: collating, forward, backward, clipping, update, logging. While one
process works the others are stopped by SIGSTOP, threads and all, so that nobody works ahead or spins.

Every time is taken by two clocks: the one on the wall, and the processor time that the worker used. With one thread the
second hardly changes when the machine has other work to do.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class Turns:
    """The worker's side: reports on the true standard output, on which nothing else may print."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        gradient_file: Path | None = None,
        on_step: Callable[[], object] = lambda: None,
    ) -> None:
        """Put the hooks in place.

        Args:
            parameters: names that all workers share, to parameters; their gradients in the first step are kept.
            gradient_file: where they are kept.
            on_step: called behind every optimizer step.
        """
        self.on_step = on_step
        self.parameters, self.gradient_file = parameters, gradient_file
        self.words = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self.steps = 0
        self.started = (0.0, 0.0)
        self.memory_before = reset_peak_memory()
        register_optimizer_step_pre_hook(self._before)
        register_optimizer_step_post_hook(self._after)

    def _before(self, *_: object) -> None:
        if self.steps == 0 and self.gradient_file is not None:
            torch.save(
                {name: None if p.grad is None else p.grad.clone() for name, p in self.parameters.items()},
                self.gradient_file,
            )

    def _after(self, *_: object) -> None:
        synchronise()
        wall, processor = time.perf_counter() - self.started[0], time.process_time() - self.started[1]
        self.on_step()
        self.words.write(f"{wall:.9f} {processor:.9f}\n")
        self.steps += 1
        sys.stdin.readline()
        self.started = time.perf_counter(), time.process_time()

    def finish(self, losses: list[float], **more: Any) -> None:
        """The last word: losses of all steps, memory at its peak and before, in bytes."""
        memory = {"memory_before": self.memory_before, "memory_peak": peak_memory()}
        self.words.write(json.dumps({"losses": losses, "threads": torch.get_num_threads(), **memory, **more}) + "\n")
        self.words.close()


class Worker:
    """The outer side: a process that trains one step when it is told to.

    Attributes:
        name: for messages.
        times: seconds of every step after the first, on the wall.
        processor_times: the same by the processor's clock.
        result: what the worker said at its end.
    """

    def __init__(self, name: str, command: list[str], environment: Mapping[str, str] | None = None) -> None:
        """Start the process and let it do its first step."""
        self.name = name
        self.times: list[float] = []
        self.processor_times: list[float] = []
        self.result: dict[str, Any] = {}
        self.log = Path(command[-1]).with_suffix(".log")
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            bufsize=1,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | dict(environment or {}),
        )
        self._read()
        self.process.send_signal(signal.SIGSTOP)

    def step(self) -> None:
        """One more step."""
        self._word()
        wall, processor = map(float, self._read().split())
        self.process.send_signal(signal.SIGSTOP)
        self.times.append(wall)
        self.processor_times.append(processor)

    def finish(self) -> dict[str, Any]:
        """Let the process come to its end; what it said there."""
        self._word()
        self.result = json.loads(self._read())
        self.process.wait()
        return self.result

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def _word(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise RuntimeError(f"{self.name} ended with code {code}:\n{self.log.read_text()[-3000:]}")
        return line


def take_turns(starts: Mapping[str, Callable[[], Worker]], steps: int) -> dict[str, Worker]:
    """Start every worker, then give each in turn one step, `steps` times, the order reversed every other time."""
    workers: dict[str, Worker] = {}
    try:
        for name, start in starts.items():
            workers[name] = start()
        for number in range(steps):
            names = list(workers) if number % 2 == 0 else list(reversed(workers))
            for name in names:
                workers[name].step()
        for worker in workers.values():
            worker.finish()
    finally:
        for worker in workers.values():
            worker.stop()
    return workers


def synchronise() -> None:
    """Wait for the accelerator, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak_memory() -> int:
    """Forget how much memory this process once used; what it uses now, in bytes (of the GPU where there is one)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def peak_memory() -> int:
    """The most memory this process has used since it was reset, in bytes."""
    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else _memory("VmHWM")


def _memory(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")
