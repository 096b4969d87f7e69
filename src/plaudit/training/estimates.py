"""What a run would need, before it runs: records, tokens, memory and time, measured where that is quick."""

import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plaudit.configs.training import TrainingConfig
from plaudit.training.progress import duration_text
from plaudit.training.run import total_steps

BYTES_PER_OPTIMIZER_STATE = {"adamw": 8, "sgd": 0}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run would need.

    Attributes:
        num_records: training records in an epoch.
        tokens_per_epoch: tokens through the network in an epoch, a shared prompt counted once.
        steps: optimizer steps.
        parameters: all parameters.
        trainable: those that are trained.
        state_bytes: weights, gradients and optimizer state: computed.
        activation_bytes: growth of memory during the trial pass: measured.
        tokens_per_second: forward and backward: measured.
        seconds: training and evaluation, from that rate; saving and start not included.
        device: where the trial ran.
    """

    num_records: int
    tokens_per_epoch: int
    steps: int
    parameters: int
    trainable: int
    state_bytes: int
    activation_bytes: int
    tokens_per_second: float
    seconds: float
    device: str

    def print(self) -> None:
        """Print the estimate to the standard output, one fact a line."""
        lines = [
            f"records          {self.num_records:,}",
            f"tokens           {self.tokens_per_epoch:,} an epoch (a shared prompt counts once)",
            f"optimizer steps  {self.steps:,}",
            f"parameters       {self.parameters:,}, {self.trainable:,} of them trained",
            f"memory           {size_text(self.state_bytes)} for weights, gradients and optimizer (computed)",
            f"                 + {size_text(self.activation_bytes)} for activations (measured in a trial pass)",
            f"speed            {self.tokens_per_second:,.0f} tokens/s on {self.device} (measured in a trial pass)",
            f"time             about {duration_text(self.seconds)} (from that speed; evaluation included)",
        ]
        sys.stdout.write("\n".join(lines) + "\n")


def estimate_run(
    config: TrainingConfig,
    trained: nn.Module,
    trial: Callable[[Sequence[int]], Tensor],
    *,
    micro_batches: Sequence[Sequence[int]],
    lengths: Sequence[int],
    held_out_lengths: Sequence[int],
    steps_per_epoch: int,
    device: torch.device,
    passes: int = 3,
) -> Estimate:
    """Run a few forward and backward passes without any update, and reckon from them.

    Args:
        config: of the run.
        trained: everything with parameters.
        trial: the loss of some training records.
        micro_batches: of the first step; the largest warms up and shows the memory, then up to `passes` are timed.
        lengths: tokens of the training records.
        held_out_lengths: tokens of the held-out records; an evaluation costs a third of a training pass per token.
        steps_per_epoch: optimizer steps in an epoch.
        device: where the model is.
        passes: how many micro-batches are timed.
    """
    parameters = sum(each.numel() * each.element_size() for each in trained.parameters())
    trained_ones = [each for each in trained.parameters() if each.requires_grad]
    trainable = sum(each.numel() for each in trained_ones)
    gradients = sum(each.numel() * each.element_size() for each in trained_ones)
    largest = max(micro_batches, key=lambda chosen: sum(lengths[index] for index in chosen))
    before = _memory(device)
    trial(largest).backward()  # type: ignore[no-untyped-call]
    activations = max(0, _memory(device) - before - gradients)
    tokens, started = 0, time.perf_counter()
    for chosen in micro_batches[:passes]:
        trial(chosen).backward()  # type: ignore[no-untyped-call]
        tokens += sum(lengths[index] for index in chosen)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    rate = tokens / max(time.perf_counter() - started, 1e-9)
    trained.zero_grad(set_to_none=True)
    steps = total_steps(config, steps_per_epoch)
    epoch_tokens = sum(lengths)
    every = config.evaluate_every or steps_per_epoch
    evaluations = -(-steps // every) if held_out_lengths else 0
    work = steps / steps_per_epoch * epoch_tokens + evaluations * sum(held_out_lengths) / 3
    return Estimate(
        num_records=len(lengths),
        tokens_per_epoch=epoch_tokens,
        steps=steps,
        parameters=sum(each.numel() for each in trained.parameters()),
        trainable=trainable,
        state_bytes=parameters + gradients + trainable * BYTES_PER_OPTIMIZER_STATE[config.optimizer.name],
        activation_bytes=activations,
        tokens_per_second=rate,
        seconds=work / rate,
        device=str(device),
    )


def _memory(device: torch.device) -> int:
    """The most memory that this process has used so far, in bytes: on the device, or of the process on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in kibibytes, macOS in bytes.
    return peak if sys.platform == "darwin" else peak * 1024


def size_text(count: int) -> str:
    """Bytes as `1.50 GiB` or `12.0 MiB`."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"
