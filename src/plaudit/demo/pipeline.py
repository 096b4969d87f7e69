"""The main job on the built-in world: `main(config)` runs the stages below, one after the other.

    world → demonstrations → supervised fine-tuning → rankings → reward model, normalised → evaluation → report

Every stage takes what the earlier ones left in a `DemoRun` and adds to it, so that alignment can join them between
`reward_model` and `report`.
"""

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from plaudit.configs.demo import DemoConfig
from plaudit.configs.evaluate import EvaluateRewardConfig
from plaudit.configs.reward import RewardTrainingConfig
from plaudit.configs.sft import SftConfig
from plaudit.data.io import write_comparisons, write_demonstrations
from plaudit.data.records import Comparison, Demonstration
from plaudit.data.vocabulary import train_tokenizer
from plaudit.demo.best_of import BestOf, best_of_n
from plaudit.demo.report import write_demo_report
from plaudit.demo.world import BayesOptimum, World
from plaudit.evaluation.report import RewardReport
from plaudit.evaluation.reward import evaluate_reward
from plaudit.training import reward, sft
from plaudit.training.messages import say
from plaudit.training.results import TrainingResult

AnyResult = TypeVar("AnyResult", bound=TrainingResult)

MARKER = "made-by-plaudit-demo.txt"
"""The file by which a folder is known to be a demo's, and nobody's own work."""


@dataclass
class DemoRun:
    """What the stages have made so far.

    Attributes:
        config: of the demo.
        world: the letters, the shop and its annotators.
        demonstrations: good replies, to fine-tune on.
        train: rankings to learn from.
        test: rankings of other prompts.
        optimum: how well the test rankings can be foretold at all.
        policy: the fine-tuned language model's run.
        reward_model: the reward model's run.
        report: its evaluation on the test rankings.
        best_of: whether the reward model picks better answers out of the policy's own.
        page: where the report was written.
        seconds: wall-clock time by stage.
    """

    config: DemoConfig
    world: World
    demonstrations: list[Demonstration] = field(default_factory=list)
    train: list[Comparison] = field(default_factory=list)
    test: list[Comparison] = field(default_factory=list)
    optimum: BayesOptimum | None = None
    policy: TrainingResult | None = None
    reward_model: reward.RewardTrainingResult | None = None
    report: RewardReport | None = None
    best_of: BestOf | None = None
    page: Path | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def file(self, name: str) -> Path:
        """A file in the demo's folder."""
        return self.config.output / name


def main(config: DemoConfig, *, dry_run: bool = False) -> DemoRun | None:
    """Run every stage and write `<output>/report.html`.

    Args:
        config: sizes and seeds.
        dry_run: only say what would be done; returns None.

    Returns:
        Everything that was made.

    Raises:
        ValueError: if the output folder holds something that is no demo.
    """
    if dry_run:
        say(f"would run {', '.join(STAGES)} in {config.output}: about 2 minutes on 2 cores at the default sizes")
        return None
    _clear(config.output)
    run = DemoRun(config, World(config.seed))
    for name, stage in STAGES.items():
        say(f"── {name.replace('_', ' ')}")
        started = time.perf_counter()
        stage(run)
        run.seconds[name] = time.perf_counter() - started
    run.page = write_demo_report(run)
    say(headline(run))
    say(f"demo: {sum(run.seconds.values()):.0f} s; open {run.page}")
    return run


def make_world(run: DemoRun) -> None:
    """Write demonstrations and rankings, train and test on different prompts, and train a tokenizer on them."""
    config = run.config
    run.demonstrations = run.world.demonstrations(config.demonstrations)
    run.train = run.world.comparisons(config.rankings)
    run.test = run.world.comparisons(config.test_rankings, "test")
    run.optimum = run.world.bayes_optimum(run.test)
    write_demonstrations(run.demonstrations, run.file("data/demonstrations.jsonl"))
    write_comparisons(run.train, run.file("data/train.jsonl"))
    write_comparisons(run.test, run.file("data/test.jsonl"))
    texts = [text for d in run.demonstrations for text in (str(d.prompt), d.completion)]
    texts += [text for c in run.train for text in (str(c.prompt), *c.completions)]
    train_tokenizer(texts, config.vocabulary).save_pretrained(run.file("tokenizer"))
    say(
        f"{len(run.demonstrations)} demonstrations, {len(run.train)} rankings to learn from, {len(run.test)} to test on"
    )


def fine_tune(run: DemoRun) -> None:
    """Train a small decoder from random weights on the demonstrations."""
    config = run.config
    heads = num_heads(config.hidden_size)
    settings = {
        "model": {
            "model_type": "llama",
            "tokenizer": str(run.file("tokenizer")),
            "backbone_config": {
                "hidden_size": config.hidden_size,
                "intermediate_size": 3 * config.hidden_size,
                "num_hidden_layers": config.layers,
                "num_attention_heads": heads,
                "num_key_value_heads": heads,
                "max_position_embeddings": 512,
                "tie_word_embeddings": True,
            },
            "seed": config.seed,
        },
        "epochs": config.sft_epochs,
        "records_per_step": 8,
        "optimizer": {"learning_rate": 2e-3, "warmup": 0.05},
        **_shared(run, "sft"),
    }
    held_out = run.world.demonstrations(max(20, config.demonstrations // 15), "test")
    result = sft.main(SftConfig.model_validate(settings), train=run.demonstrations, held_out=held_out)
    assert isinstance(result, TrainingResult)
    run.policy = _complete(result)


def train_reward_model(run: DemoRun) -> None:
    """Start from the fine-tuned model, learn from the rankings, and let demonstrations score 0 on average."""
    assert run.policy is not None
    settings = {
        "model": {"backbone": str(run.policy.model_folder), "seed": run.config.seed},
        "epochs": run.config.reward_epochs,
        "held_out_fraction": 0.1,
        "optimizer": {"learning_rate": 5e-4, "head_learning_rate": 1e-3, "warmup": 0.1},
        **_shared(run, "reward"),
        "records_per_step": 4,
    }
    result = reward.main(
        RewardTrainingConfig.model_validate(settings), train=run.train, demonstrations=run.demonstrations
    )
    assert isinstance(result, reward.RewardTrainingResult)
    run.reward_model = _complete(result)


def evaluate(run: DemoRun) -> None:
    """Measure the reward model on the test rankings, beside the floors."""
    assert run.reward_model is not None
    config = EvaluateRewardConfig(
        models=(f"reward model={run.reward_model.model_folder}",),
        data=(str(run.file("data/test.jsonl")),),
        train_data=(str(run.file("data/train.jsonl")),),
        output=run.file("evaluation"),
        seed=run.config.seed,
    )
    run.report = evaluate_reward(config)


def choose_best(run: DemoRun) -> None:
    """Let the fine-tuned model answer test prompts and see whether the reward model's favourite is the better one."""
    assert run.policy is not None
    assert run.reward_model is not None
    prompts = run.world.prompts(run.config.best_of_prompts, "test")
    run.best_of = best_of_n(
        run.policy.model, run.reward_model.model, prompts, samples=run.config.best_of, seed=run.config.seed
    )


STAGES: dict[str, Callable[[DemoRun], None]] = {
    "make_world": make_world,
    "fine_tune": fine_tune,
    "train_reward_model": train_reward_model,
    "evaluate": evaluate,
    "choose_best": choose_best,
}
"""Stage by name, in the order in which they run."""


def _shared(run: DemoRun, name: str) -> dict[str, object]:
    return {"output": run.file(name), "seed": run.config.seed, "log_every": 20, "tokens_per_micro_batch": 4096}


def _complete(result: AnyResult) -> AnyResult:
    """The result; where a signal stopped its run, the whole demo ends with the code of that signal."""
    if not result.complete:
        sys.exit(result.exit_code)
    return result


def num_heads(hidden_size: int) -> int:
    """As many attention heads of width 64 or wider as divide a multiple of 16 into even widths; at least one."""
    return max(
        heads
        for heads in range(1, max(1, hidden_size // 64) + 1)
        if hidden_size % heads == hidden_size // heads % 2 == 0
    )


def headline(run: DemoRun) -> str:
    """One line: held-out pair accuracy beside the most that the annotators' noise allows, and the floors."""
    assert run.report is not None
    assert run.optimum is not None
    model = run.report.models[0].metrics["accuracy"]
    floors = ", ".join(
        f"{f.name.replace('_', ' ')} {100 * f.metrics['accuracy'].value:.1f} %" for f in run.report.floors
    )
    return (
        f"held-out pair accuracy {100 * model.value:.1f} % ({100 * model.low:.1f} to {100 * model.high:.1f}); "
        f"Bayes optimum of the noisy annotators {100 * run.optimum.drawn_accuracy:.1f} % on these labels, "
        f"{100 * run.optimum.accuracy:.1f} % expected; floors: {floors}"
    )


def _clear(output: Path) -> None:
    """Remove an earlier demo, known by its marker; anything else in the folder is left alone and refused."""
    marker = output / MARKER
    if output.exists() and any(output.iterdir()):
        if not marker.exists():
            raise ValueError(f"output: {output} holds something that is no demo; name another folder")
        shutil.rmtree(output)
    (output / "data").mkdir(parents=True)
    marker.write_text("Made by plaudit demo, which replaces this whole folder when it runs again.\n", encoding="utf-8")
