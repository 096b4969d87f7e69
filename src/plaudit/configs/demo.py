"""The built-in world's main job."""

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt

from plaudit.configs.base import Config


class DemoConfig(Config):
    """From letters to a small shop to a policy that answers them better: all is made here, nothing is downloaded."""

    output: Path = Path("runs/demo")
    """Folder of the report, the data, the models and their metrics; an earlier demo there is replaced."""
    seed: int = Field(default=0, ge=0)
    """Seed of the world, the models and the training."""

    threads: Literal["auto"] | PositiveInt = 1
    """Threads that share an operation on the CPU. So small a model gains little from a second one (a tenth of
    fine-tuning on an idle machine), and loses much where another program needs the core; `auto` is what torch takes."""

    letter_book: int = Field(default=8000, ge=20)
    """Replies of the shop's staff, every other one good, to fine-tune on."""
    demonstrations: int = Field(default=300, ge=20)
    """Good replies: their average reward is the reward model's 0."""
    other_replies: int = Field(default=0, ge=0)
    """Good replies to other letters that stand beside each of them in the reward model's training, so that it learns
    which letter each is for; 0 trains on rankings alone."""
    rankings: int = Field(default=1600, ge=20)
    """Letters whose 4 to 9 replies annotators have ranked, to train the reward model on."""
    test_rankings: int = Field(default=200, ge=20)
    """Rankings of other prompts, to measure it on."""

    vocabulary: int = Field(default=1600, ge=300)
    """Entries of the tokenizer that is trained on the world's texts."""
    hidden_size: int = Field(default=128, ge=16, multiple_of=16)
    """Width of the decoder, a multiple of 16; its attention heads are 64 wide or a little wider."""
    layers: int = Field(default=2, ge=1)
    """Depth of the decoder."""
    initial_spread: float | None = Field(default=None, gt=0)
    """Standard deviation of the decoder's random weights; 1/√hidden_size if not given. Drawn much smaller than that
    (the 0.02 of most large models is 1/√2500), so narrow a decoder hardly looks at the letter for as long as the demo
    has time."""
    sft_epochs: float = Field(default=1.0, gt=0)
    """Passes over the letter book."""
    reward_epochs: float = Field(default=1.5, gt=0)
    """Passes over the rankings."""

    iterations: int = Field(default=20, ge=1)
    """Rounds of PPO: sample answers, score them, update."""
    prompts_per_iteration: int = Field(default=16, ge=2)
    """Letters answered in each of them, eight times each."""
    learning_rate: float = Field(default=6e-4, gt=0)
    """PPO's rate after three small steps; from there it falls to 0."""
    max_new_tokens: int = Field(default=96, ge=8)
    """Longest answer in tokens."""
    kl_coefficient: float = Field(default=0.1, ge=0)
    """Weight of the divergence from the fine-tuned model."""
    test_prompts: int = Field(default=64, ge=4)
    """Letters that nobody trained on, which both policies answer in the end."""
