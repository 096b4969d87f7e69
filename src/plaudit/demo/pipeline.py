"""The main job on the built-in world: `main(config)` runs the stages below, one after the other.

    world → letter book → fine-tuning → rankings of its answers → reward model, normalised → PPO → did it help?

Every stage takes what the earlier ones left in a `DemoRun` and adds to it.
"""

import copy
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from plaudit.configs.align import AlignConfig
from plaudit.configs.demo import DemoConfig
from plaudit.configs.evaluate import EvaluateRewardConfig
from plaudit.configs.evaluate_policy import EvaluatePolicyConfig
from plaudit.configs.generation import SamplingConfig
from plaudit.configs.reward import RewardTrainingConfig
from plaudit.configs.sft import SftConfig
from plaudit.data.contrast import beside_others
from plaudit.data.io import write_comparisons, write_demonstrations
from plaudit.data.records import Comparison, Demonstration, PromptRecord
from plaudit.data.vocabulary import train_tokenizer
from plaudit.demo.report import closing_lines, write_demo_report
from plaudit.demo.world import BayesOptimum, World, gold_reward
from plaudit.evaluation.policy import evaluate_policy
from plaudit.evaluation.policy_report import PolicyReport
from plaudit.evaluation.report import RewardReport
from plaudit.evaluation.reward import evaluate_reward
from plaudit.models.causal_lm import CausalLM
from plaudit.rewards.combine import combine
from plaudit.rewards.normalise import Running, normalised
from plaudit.rollout.answering import sample_answers
from plaudit.training import align, reward, sft
from plaudit.training.messages import say
from plaudit.training.precision import threads
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
        letter_book: replies of every kind, to fine-tune on.
        demonstrations: good replies, whose average reward becomes 0.
        train: rankings to learn from.
        test: rankings of other prompts.
        optimum: how well the test rankings can be foretold at all.
        policy: the fine-tuned language model's run.
        reward_model: the reward model's run.
        report: its evaluation on the test rankings.
        aligned: the aligned language model's run.
        on_the_way: copies of the policy after a third and two thirds of the iterations.
        comparison: the aligned model beside the fine-tuned one on letters that nobody trained on.
        page: where the report was written.
        seconds: wall-clock time by stage.
    """

    config: DemoConfig
    world: World
    letter_book: list[Demonstration] = field(default_factory=list)
    demonstrations: list[Demonstration] = field(default_factory=list)
    train: list[Comparison] = field(default_factory=list)
    test: list[Comparison] = field(default_factory=list)
    optimum: BayesOptimum | None = None
    policy: TrainingResult | None = None
    reward_model: reward.RewardTrainingResult | None = None
    report: RewardReport | None = None
    aligned: TrainingResult | None = None
    on_the_way: dict[int, CausalLM] = field(default_factory=dict)
    comparison: PolicyReport | None = None
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
        say(f"would run {', '.join(STAGES)} in {config.output}: about 4 minutes of processor time at the default sizes")
        return None
    _clear(config.output)
    run = DemoRun(config, World(config.seed))
    with threads(config.threads):
        for name, stage in STAGES.items():
            say(f"── {name.replace('_', ' ')}")
            started = time.perf_counter()
            stage(run)
            run.seconds[name] = time.perf_counter() - started
    run.page = write_demo_report(run)
    for line in closing_lines(run):
        say(line)
    return run


def make_world(run: DemoRun) -> None:
    """Write the shop's letter book and some good replies, and train a tokenizer on the book."""
    config = run.config
    run.letter_book = run.world.letter_book(config.letter_book)
    run.demonstrations = run.world.demonstrations(config.demonstrations)
    write_demonstrations(run.letter_book, run.file("data/letter-book.jsonl"))
    write_demonstrations(run.demonstrations, run.file("data/demonstrations.jsonl"))
    texts = [text for each in run.letter_book for text in (str(each.prompt), each.completion)]
    train_tokenizer(texts, config.vocabulary).save_pretrained(run.file("tokenizer"))


def fine_tune(run: DemoRun) -> None:
    """Train a small decoder from random weights on the letter book: it learns to write like the shop, well or badly."""
    held_out = run.world.letter_book(max(20, run.config.letter_book // 40), "test")
    settings = SftConfig.model_validate(fine_tune_settings(run))
    result = sft.main(settings, train=run.letter_book, held_out=held_out)
    assert isinstance(result, TrainingResult)
    run.policy = _complete(result)


def fine_tune_settings(run: DemoRun) -> dict[str, Any]:
    """How the demo trains its language model from random weights."""
    config = run.config
    heads = num_heads(config.hidden_size)
    return {
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
                # With the 0.02 of most large models (1/√2500) so narrow a one writes letters without reading any.
                "initializer_range": config.initial_spread or config.hidden_size**-0.5,
            },
            "seed": config.seed,
        },
        "epochs": config.sft_epochs,
        "records_per_step": 8,
        # So small a model wants larger steps than pretrained ones.
        "optimizer": {"learning_rate": 6e-3, "betas": (0.9, 0.95), "warmup": 0.05},
        **_shared(run, "sft"),
    }


def collect_rankings(run: DemoRun) -> None:
    """Annotators rank 4 to 9 replies to a letter, half of them sampled from the fine-tuned model; train and test."""
    assert run.policy is not None
    config, model = run.config, run.policy.model
    for split, count in (("train", config.rankings), ("test", config.test_rankings)):
        prompts = run.world.comparison_prompts(count, split)
        answers = _sample(run, model, prompts, samples=4, seed=config.seed + (split == "test"))
        records = run.world.comparisons(count, split, answers=answers)
        write_comparisons(records, run.file(f"data/{split}.jsonl"))
        if split == "train":
            run.train = records
        else:
            run.test = records
    run.optimum = run.world.bayes_optimum(run.test)
    say(f"{len(run.train)} rankings to learn from, {len(run.test)} to test on")


def train_reward_model(run: DemoRun) -> None:
    """Start from the fine-tuned model, learn from the rankings, and let demonstrations score 0 on average.

    Where the demo is told to, it also reads every demonstration among good replies to other letters.
    """
    assert run.policy is not None
    train, others = run.train, run.config.other_replies
    if others:
        beside = beside_others(run.demonstrations, others=others, seed=run.config.seed)
        write_comparisons(beside, run.file("data/beside-others.jsonl"))
        train = [*train, *beside]
    settings = RewardTrainingConfig.model_validate(reward_settings(run))
    result = reward.main(settings, train=train, demonstrations=run.demonstrations)
    assert isinstance(result, reward.RewardTrainingResult)
    run.reward_model = _complete(result)


def reward_settings(run: DemoRun) -> dict[str, Any]:
    """How the demo trains a reward model from its fine-tuned one; the seed is the demo's."""
    return {
        "model": {"backbone": str(run.file("sft/model")), "seed": run.config.seed},
        "epochs": run.config.reward_epochs,
        "held_out_fraction": 0.1,
        "optimizer": {"learning_rate": 5e-4, "head_learning_rate": 1e-3, "warmup": 0.1},
        **_shared(run, "reward"),
        "records_per_step": 4,
    }


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


def align_policy(run: DemoRun) -> None:
    """PPO: sample answers, score them by the frozen reward model, update; gold is watched, never learned from."""
    assert run.policy is not None
    assert run.reward_model is not None
    config = run.config
    settings = {
        "model": {"backbone": str(run.policy.model_folder)},
        # In the few thousand answers that there is time for, a critic would learn too late to be of use: the baseline
        # is the mean reward of the other answers to the same letter.
        "algorithm": {
            "name": "ppo",
            "baseline": "leave_one_out",
            "epochs": 1,
            "minibatches": 4,
            "kl_coefficient": config.kl_coefficient,
        },
        "sampling": {"max_new_tokens": config.max_new_tokens},
        "iterations": config.iterations,
        "prompts_per_iteration": config.prompts_per_iteration,
        "samples_per_prompt": 8,
        # From a small first step down to none: what the last steps add by chance is divergence and nothing else.
        "optimizer": {
            "learning_rate": config.learning_rate,
            "schedule": "linear",
            "warmup": 3,
            "epsilon": 1e-5,
            "weight_decay": 0.0,
        },
        "evaluate_every": None,
        "save_every": None,
        **_shared(run, "align"),
        "log_every": 4,
    }
    scorer = combine({"proxy": (normalised(run.reward_model.model, Running(shift=False)), 1.0), "gold": (_gold, 0.0)})
    prompts = [
        PromptRecord(prompt=text) for text in run.world.prompts(config.iterations * config.prompts_per_iteration)
    ]
    thirds = {max(1, config.iterations * part // 3) for part in (1, 2)} - {config.iterations}

    def keep(iteration: int, model: CausalLM) -> None:
        if iteration in thirds:
            run.on_the_way[iteration] = copy.deepcopy(model).eval()

    result = align.main(AlignConfig.model_validate(settings), prompts=prompts, reward=scorer, on_iteration=keep)
    assert isinstance(result, TrainingResult)
    run.aligned = _complete(result)


def compare(run: DemoRun) -> None:
    """Both policies answer letters that nobody trained on: win rate, rewards, divergence, best of n."""
    assert run.policy is not None
    assert run.aligned is not None
    assert run.reward_model is not None
    config = run.config
    run.comparison = evaluate_policy(
        EvaluatePolicyConfig(
            sampling=SamplingConfig(max_new_tokens=config.max_new_tokens),
            limit=None,
            seed=config.seed,
            output=run.file("comparison"),
        ),
        policies={f"PPO/{config.iterations}": run.aligned.model}
        | {f"PPO/{step}": model for step, model in run.on_the_way.items()},
        reference=CausalLM.from_pretrained(str(run.policy.model_folder)),
        rewards={"proxy": run.reward_model.model, "gold": _gold},
        prompts=run.world.prompts(config.test_prompts, "test"),
    )


STAGES: dict[str, Callable[[DemoRun], None]] = {
    "make_world": make_world,
    "fine_tune": fine_tune,
    "collect_rankings": collect_rankings,
    "train_reward_model": train_reward_model,
    "evaluate": evaluate,
    "align_policy": align_policy,
    "compare": compare,
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


def _sample(run: DemoRun, model: CausalLM, prompts: Sequence[str], *, samples: int, seed: int) -> list[list[str]]:
    """`samples` answers to each prompt at temperature 1."""
    _, found = sample_answers(
        model,
        [PromptRecord(prompt=prompt) for prompt in prompts],
        samples_per_prompt=samples,
        sampling=SamplingConfig(max_new_tokens=run.config.max_new_tokens, seed=seed),
    )
    texts = [each.completion for each in found]
    return [texts[start : start + samples] for start in range(0, len(texts), samples)]


def _gold(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    return [gold_reward(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]


def _clear(output: Path) -> None:
    """Remove an earlier demo, known by its marker; anything else in the folder is left alone and refused."""
    marker = output / MARKER
    if output.exists() and any(output.iterdir()):
        if not marker.exists():
            raise ValueError(f"output: {output} holds something that is no demo; name another folder")
        shutil.rmtree(output)
    (output / "data").mkdir(parents=True)
    marker.write_text("Made by plaudit demo, which replaces this whole folder when it runs again.\n", encoding="utf-8")
