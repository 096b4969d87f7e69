"""What every training job shares: where it writes, how far it goes, how it steps, when it looks and saves."""

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from plaudit.configs.base import Config
from plaudit.configs.data import Annotators, DataConfig, OnError, SplitKey


class OptimizerConfig(Config):
    """The optimizer, its learning rates and their schedule."""

    name: Literal["adamw", "sgd"] = "adamw"
    """`adamw` (decoupled weight decay), or plain `sgd`."""
    learning_rate: float = Field(default=2e-5, gt=0)
    """Peak rate. 1e-5 to 5e-5 suits full fine-tuning, 1e-4 to 3e-4 LoRA, 1e-3 a small model from scratch."""
    head_learning_rate: float | None = Field(default=None, gt=0)
    """Peak rate of the reward head; None means the same as the rest. A fresh head often wants ten times more."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decay of matrices; norms, biases, other vectors and embeddings are never decayed."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging of the gradient and of its square."""
    epsilon: float = Field(default=1e-8, gt=0)
    """AdamW's floor under the root of the squared average."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Momentum of `sgd`."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the rate goes on after the warm-up: flat, a straight line or half a cosine down to `final_fraction`."""
    warmup: float = Field(default=0.05, ge=0)
    """Warm-up: below 1 a fraction of all steps, from 1 on a number of steps."""
    final_fraction: float = Field(default=0.0, ge=0, le=1)
    """What is left of the peak rate at the last step."""
    max_gradient_norm: float | None = Field(default=1.0, gt=0)
    """Gradients are scaled down to this joint norm; None leaves them."""

    @model_validator(mode="after")
    def _check(self) -> "OptimizerConfig":
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas}: both must lie in [0, 1)")
        if self.momentum and self.name != "sgd":
            raise ValueError("momentum is an option of sgd; adamw has betas")
        return self


class RecordsConfig(Config):
    """Where a run's records come from."""

    data: tuple[str | DataConfig, ...] = ()
    """Files, folders or dataset names; a mapping (`path`, `format`, `columns`, …) for one with options of its own."""
    format: str | None = None
    """The format of all plain names; None recognises each by its columns."""
    on_error: OnError = "refuse"
    """Stop at the first record that cannot be used, or skip such records and count them by reason."""
    annotators: Annotators = "apart"
    """Several annotators of the same completions: one comparison each, or merged into one."""
    group_key: str | None = None
    """Key (dots for nested ones) whose value must never be on both sides of a split, such as `doc` or `tree`."""
    limit: int | None = Field(default=None, gt=0)
    """Read at most this many records of each plain name."""
    held_out: tuple[str | DataConfig, ...] = ()
    """Records to evaluate on; never trained on."""
    held_out_fraction: float | None = Field(default=None, gt=0, lt=1)
    """Instead of `held_out`: hold out about this share of `data`, whole prompts at a time."""
    split_by: SplitKey = "prompt"
    """What must not stand on both sides of that split: the first user turn, or also the record's group."""


class FolderConfig(Config):
    """What every job shares that learns for a while: its folder, its seed, what it shows and keeps."""

    output: Path = Path("runs/training")
    """Folder of the run: `model/`, `checkpoints/`, `metrics.jsonl`, `configuration.yaml`, `result.json`."""
    overwrite: bool = False
    """Start afresh in a folder that holds a run; without it such a folder is refused unless `resume` is given."""
    resume: bool = False
    """Go on from the last good checkpoint in `output`; starts at the beginning where there is none."""
    seed: int = Field(default=0, ge=0)
    """Decides the order of the data, dropout and sampling; `model.seed` decides random weights."""
    threads: Literal["auto"] | PositiveInt = "auto"
    """Threads that share an operation on the CPU. `auto` is what torch takes (`OMP_NUM_THREADS`, else one per core),
    but no more than this process may use: in a container with a quota of two processors on a machine of 64, two."""
    evaluate_every: int | None = Field(default=None, gt=0)
    """Steps between evaluations on held-out records; None: once at the end of every epoch."""
    save_every: int | None = Field(default=None, gt=0)
    """Steps between checkpoints; None: at the end of every epoch of 50 steps or more (of several shorter ones). The
    last step and the best are always saved."""
    keep_last: int = Field(default=2, ge=1)
    """How many of the newest checkpoints stay on the disk, beside the best one. Two, so that a damaged one is no
    disaster."""
    log_every: int = Field(default=10, gt=0)
    """Steps between printed lines; `metrics.jsonl` and the trackers get every step."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ()
    """Where metrics go besides `metrics.jsonl`."""
    quiet: bool = False
    """Print no progress and no notes; warnings still appear."""

    @model_validator(mode="after")
    def _check_folder(self) -> "FolderConfig":
        if self.resume and self.overwrite:
            raise ValueError("resume goes on with a run and overwrite throws it away: give one of them")
        return self


class RunConfig(FolderConfig, RecordsConfig):
    """What every job that moves weights shares: where it writes, how it steps, how it computes, when it saves."""

    tokens_per_micro_batch: int = Field(default=8192, gt=0)
    """Token budget of one forward pass, which bounds memory; a step takes as many passes as it needs. It does not
    change what is computed, only in how many pieces: completions of a record that is longer go through one part after
    the other, which costs another forward; one completion that is longer goes alone."""

    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer, rates, schedule, clipping."""
    precision: Literal["float32", "bf16"] = "float32"
    """`bf16` runs the backbone's products in bfloat16; weights, head and loss stay in float32."""
    device: str = "auto"
    """`auto` (CUDA where there is one), `cpu`, `cuda`, `cuda:1`."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third more time, far less memory."""

    @model_validator(mode="after")
    def _check_run(self) -> "RunConfig":
        if self.held_out and self.held_out_fraction is not None:
            raise ValueError("give held_out (files) or held_out_fraction (a share of data), not both")
        return self


class TrainingConfig(RunConfig):
    """The options that supervised fine-tuning and reward training share: passes over records."""

    epochs: float = Field(default=1.0, gt=0)
    """Passes over the training records; parts of one are allowed."""
    max_steps: int | None = Field(default=None, gt=0)
    """Stop after this many optimizer steps even if the epochs are not over."""
    patience: int | None = Field(default=None, gt=0)
    """Stop after this many evaluations in a row without an improvement; needs held-out records."""
    tolerance: float = Field(default=0.0, ge=0)
    """How much lower (in nats) the held-out value must be to count as an improvement."""
    keep_best: bool = True
    """With held-out records: the final model is that of the best evaluation, not that of the last step."""

    records_per_step: int = Field(default=32, gt=0)
    """Prompts (or demonstrations) per optimizer step."""
    window_steps: int = Field(default=1, gt=0)
    """So many steps are sorted by length together before they are cut and shuffled. 1 keeps steps unbiased in length,
    which packed rows need not pay for; more saves padding where rows are padded."""

    token_cache: str = "auto"
    """Folder in which token ids are kept for the next run on the same texts; `auto` is `plaudit/tokens` in the user's
    cache folder (`$XDG_CACHE_HOME`, `~/.cache`), `off` keeps none. What takes less than a second is not kept."""
    prefetch: int = Field(default=2, ge=0)
    """Micro-batches that a background thread packs ahead while the network works; 0 packs each when it is needed."""
    compile: bool = False
    """`torch.compile` for the norms and feed-forward parts of the layers: less time for small operations, half a minute
    longer at the start. On the CPU it needs a C++ compiler; without one a warning says so and the run goes on. Results
    change by rounding."""
    parallel: Literal["auto", "ddp", "fsdp"] | None = None
    """How the processes that torchrun started share the run: `ddp` (each holds the whole model) or `fsdp` (each holds a
    part of it); `auto` is `ddp` unless training would take more than half of a GPU. None is a single process."""
    process_timeout: float = Field(default=600, gt=0)
    """Seconds that a process waits for the others within a step before it gives the run up. A process that dies is
    noticed at once; saving is waited for without a limit."""

    @model_validator(mode="after")
    def _check_shared(self) -> "TrainingConfig":
        if self.tolerance and self.patience is None:
            raise ValueError(f"tolerance: {self.tolerance} has no effect without patience")
        return self
