"""Algorithms and reward models side by side on the built-in world: the study behind docs/studies/alignment.md.

    python studies/alignment.py run algorithms critic
    python studies/alignment.py run ablations reward-models --seeds 0 1 2 3 4
    python studies/alignment.py --output runs/studies/alignment-rates run rloo grpo --seeds 10 --rates 3e-4 1e-3
    python studies/alignment.py table

`run` begins, for each seed, with the first stages of `plaudit demo --seed SEED`: letter book, fine-tuned decoder,
rankings, reward model (once; a folder that a demo has left may stand at `<output>/worlds/SEED` in their place). Then
comes every run below that has no result yet: what was stopped goes on where it was. Every run draws the same number of
answers. Several `run`s may go on side by side, for seeds or runs of their own: a world that one of them makes others
wait for. `table` writes tables, plots and JSON (`alignment_report.py`). Runs have names, to be asked for one by one:
best-of-n, ppo, ppo-loo, rloo, grpo, reinforce, acer, no-kl, no-whitening and those of `arms()`; all that are families
of algorithms have a study of their own, `families_world.py`.
"""

import argparse
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from costs import peak_memory, processor_seconds

from plaudit.configs.align import AlignConfig
from plaudit.configs.demo import DemoConfig
from plaudit.configs.generation import SamplingConfig
from plaudit.configs.reward import RewardTrainingConfig
from plaudit.data.io import read_comparisons
from plaudit.data.records import Comparison, PromptRecord, Ranking, tiers_of
from plaudit.demo import pipeline
from plaudit.demo.world import World, gold_reward
from plaudit.evaluation.best_of_n import best_of_n_kl, best_of_n_means, best_of_n_sizes
from plaudit.evaluation.policy_answers import answer_prompts
from plaudit.models.causal_lm import CausalLM
from plaudit.models.reward_model import RewardModel
from plaudit.rewards.combine import combine
from plaudit.rewards.normalise import Running, normalised
from plaudit.training import align, reward
from plaudit.training.trackers import read_metrics

ROOT = Path(__file__).resolve().parents[1]
ITERATIONS, PROMPTS, SAMPLES = 12, 8, 8
"""Of every run: 768 answers. Its letters come once each, so that what they earn is a held-out measurement."""
TEST_PROMPTS, TEST_SAMPLES, BEST_OF = 96, 3, 16
RATE = 3e-4
START: dict[str, Any] = {
    "letter_book": 4000,
    "initial_spread": 0.02,
    "reward_epochs": 1.0,
}
"""What the demo's first stages were like when the study was made: a decoder that hardly looks at the letter."""
EQUAL_KL = 1.0
"""Nats per answer at which runs are compared."""
WATCHED = {
    "value": "value/mean",
    "return": "value/mean_return",
    "explained": "value/explained_variance",
    "length": "objective/length",
}
"""What else is kept of every iteration, by the names under which it is logged."""


@dataclass(frozen=True)
class Arm:
    """One way to align.

    Attributes:
        part: of the study.
        label: in tables and plots.
        algorithm: options of the algorithm beside `kl_coefficient`.
        options: of the run beside the study's own.
        reward: name of the reward model.
    """

    part: str
    label: str
    algorithm: Mapping[str, Any]
    options: Mapping[str, Any]
    reward: str = "pairs"


# Four optimizer steps on every batch: two passes in halves, or one in quarters where only the first is on the policy.
TWICE = {"epochs": 2, "minibatches": 2}
ONCE = {"minibatches": 4}
PPO = {"name": "ppo", **TWICE}
LEAVE_ONE_OUT = {**PPO, "baseline": "leave_one_out"}
CRITIC = {"critic_start": "reward"}
WARM = {"critic_warmup": 3, "critic_lambda": 1.0}
STALE = {**CRITIC, "asynchronous": {"workers": 1, "max_staleness": 1}}
ONE_BATCH = {"iterations": 1, "prompts_per_iteration": ITERATIONS * PROMPTS}

REWARD_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "pairs": ("all pairs, last token, K = 4 to 9", {}),
    "mean": ("mean of the tokens", {"model": {"aggregation": "mean"}}),
    "sum": ("sum of the tokens' rewards", {"model": {"aggregation": "sum"}}),
    "attention": ("attention pool", {"model": {"aggregation": "attention"}}),
    "best-of-k": ("best of K", {"loss": "best_of_k"}),
    "plackett-luce": ("Plackett-Luce", {"loss": "plackett_luce"}),
    "k2": ("K = 2, as many letters", {"completions": 2}),
    "k4": ("K = 4, as many letters", {"completions": 4}),
    "tenth": ("a tenth of the letters", {"share": 0.1}),
    "ensemble": ("mean of three (all pairs)", {"members": ("pairs", "pairs-1", "pairs-2")}),
}
"""Label and what differs from the first."""


def arms() -> dict[str, Arm]:
    """Every run of the study by name."""
    found = {
        "ppo": Arm("algorithms", "PPO, critic", PPO, CRITIC),
        "ppo-loo": Arm("algorithms", "PPO, leave-one-out", LEAVE_ONE_OUT, {}),
        "rloo": Arm("algorithms", "RLOO", {"name": "rloo", **ONCE}, {}),
        "grpo": Arm("algorithms", "GRPO", {"name": "grpo", **TWICE}, {}),
        "reinforce": Arm("algorithms", "REINFORCE", {"name": "reinforce", **ONCE}, {}),
        "a2c": Arm("algorithms", "A2C", {"name": "a2c", **ONCE}, CRITIC),
        "dpo-online": Arm("algorithms", "DPO, online", {"name": "dpo", **TWICE}, {}),
        "dpo": Arm("algorithms", "DPO, one batch", {"name": "dpo", "epochs": 2, "minibatches": 24}, ONE_BATCH),
        "ppo-zero": Arm("critic", "PPO, values begin at 0", PPO, CRITIC),
        "ppo-zero-warmup": Arm("critic", "the same, critic alone for 3 iterations", {**PPO, **WARM}, CRITIC),
        "ppo-warmup": Arm("critic", "PPO, critic alone for 3 iterations", {**PPO, **WARM}, CRITIC),
        "ppo-lambda1": Arm("critic", "PPO, critic, λ = 1", {**PPO, "gae_lambda": 1.0}, CRITIC),
        "acer": Arm("families", "ACER", {"name": "acer", "replay_ratio": 3.0}, {}),
        "dqn": Arm("families", "soft Q-learning", {"name": "dqn", **TWICE}, {}),
        "option-critic": Arm("families", "option-critic (styles)", {"name": "option_critic", **ONCE}, {}),
        "feudal": Arm("families", "feudal network (goals)", {"name": "feudal", **ONCE}, {}),
        "a3c": Arm("families", "A3C: A2C of a worker's answers", {"name": "a2c", "importance_cap": 2.0, **ONCE}, STALE),
        "no-kl": Arm("ablations", "PPO without KL", {**PPO, "kl_coefficient": 0.0}, CRITIC),
        "no-whitening": Arm("ablations", "PPO without whitening", {**PPO, "whiten_advantages": False}, CRITIC),
        "no-critic": Arm("ablations", "PPO without critic or other baseline", {**PPO, "baseline": "none"}, {}),
    }
    for name, (label, _) in REWARD_MODELS.items():
        if name != "pairs":
            found[f"reward-{name}"] = Arm("reward-models", label, LEAVE_ONE_OUT, {}, name)
    return found


ARMS = arms()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process at a time makes this folder; the others wait until it has."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_json(path: Path, content: Any) -> None:
    """A file that is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = path.with_name(f".{path.name}.{os.getpid()}")
    begun.write_text(json.dumps(content, indent=1) + "\n")
    begun.replace(path)


def world_run(output: Path, seed: int) -> pipeline.DemoRun:
    """The world of a seed with its fine-tuned model and rankings, made at the first call and read afterwards."""
    folder = output / "worlds" / str(seed)
    config = DemoConfig(output=folder, seed=seed, **START)
    run = pipeline.DemoRun(config, World(seed))
    with alone(folder):
        if not (folder / "reward" / "model").exists():
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "data").mkdir(parents=True)
            for stage in ("make_world", "fine_tune", "collect_rankings", "train_reward_model"):
                pipeline.STAGES[stage](run)
    run.demonstrations = run.world.demonstrations(config.demonstrations)
    run.train, run.test = (read_comparisons(folder / f"data/{split}.jsonl").records for split in ("train", "test"))
    return run


def start_model(run: pipeline.DemoRun) -> CausalLM:
    """The fine-tuned model, anew."""
    return CausalLM.from_pretrained(str(run.file("sft/model"))).eval()


def fewer(record: Comparison, count: int) -> Comparison:
    """The ranking of the first `count` completions; their places were drawn, so they are any."""
    tiers = tiers_of(record.judgement, len(record.completions)) or []
    kept = tuple(place for tier in tiers if (place := tuple(k for k in tier if k < count)))
    return Comparison(
        prompt=record.prompt, completions=record.completions[:count], judgement=Ranking(kept), id=record.id
    )


def reward_model(run: pipeline.DemoRun, name: str) -> tuple[Any, float]:
    """A reward model by its name in `REWARD_MODELS` (or `pairs-SEED`), and its accuracy on the test rankings."""
    folder = run.file(f"rewards/{name}")
    changes = dict(REWARD_MODELS[name.partition("-")[0] if name.startswith("pairs") else name][1])
    if members := changes.pop("members", None):
        models = {member: reward_model(run, member)[0] for member in members}
        scores = np.mean([np.concatenate(score_all(model, run.test)) for model in models.values()], 0)
        bounds = np.cumsum([len(record.completions) for record in run.test])[:-1]
        combined = combine({member: (model, 1 / len(members)) for member, model in models.items()})
        return combined, accuracy(run.test, np.split(scores, bounds))
    known = folder / "accuracy.json"
    with alone(folder):
        if name == "pairs":
            folder = run.file("reward")
        elif not known.exists():
            shutil.rmtree(folder, ignore_errors=True)
            train_reward_model(run, folder, changes, seed=int(name.partition("-")[2] or 0) if "pairs" in name else 0)
        model = RewardModel.from_pretrained(str(folder / "model"))
        if not known.exists():
            write_json(known, accuracy(run.test, score_all(model, run.test)))
    return model, float(json.loads(known.read_text()))


def train_reward_model(run: pipeline.DemoRun, folder: Path, changes: dict[str, Any], *, seed: int) -> None:
    """As the demo trains its own, but for what differs."""
    records = run.train[: round(len(run.train) * changes.pop("share", 1.0))]
    if count := changes.pop("completions", None):
        records = [record for each in records if len((record := fewer(each, count)).judgement.tiers) > 1]
    number = 1000 * seed + run.config.seed
    settings = pipeline.reward_settings(run) | {"output": folder, "quiet": True, "seed": number}
    settings["model"] = settings["model"] | {"seed": number} | changes.pop("model", {})
    config = RewardTrainingConfig.model_validate(settings | changes)
    reward.main(config, train=records, demonstrations=run.demonstrations)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def score_all(model: RewardModel, records: Sequence[Comparison]) -> list[np.ndarray]:
    """Rewards of every completion, `[K]` for each record."""
    found = model.score([c.prompt for c in records], [list(c.completions) for c in records])
    return [np.array(each.normalised.tolist()) for each in found]


def accuracy(records: Sequence[Comparison], scores: Sequence[np.ndarray]) -> float:
    """Share of the untied pairs that are ordered as the annotators did; equal scores count half."""
    right = []
    for record, row in zip(records, scores, strict=True):
        tiers = tiers_of(record.judgement, len(record.completions)) or []
        for better, worse in combinations(range(len(tiers)), 2):
            right += [0.5 + 0.5 * np.sign(row[i] - row[j]) for i in tiers[better] for j in tiers[worse]]
    return float(np.mean(right))


def measure(run: pipeline.DemoRun, model: CausalLM, start: CausalLM, name: str, samples: int) -> dict[str, Any]:
    """Answers to the test letters: gold reward and divergence per answer (k3), with `[P, K]` gold."""
    prompts = run.world.prompts(TEST_PROMPTS, "test")
    answers = answer_prompts(
        model,
        prompts,
        samples=samples,
        sampling=SamplingConfig(max_new_tokens=run.config.max_new_tokens),
        seed=run.config.seed,
        name=name,
        reference=start,
    )
    gold = [[gold_reward(p, text) for text in row] for p, row in zip(prompts, answers.completions, strict=True)]
    return {"texts": answers.completions, "gold": np.array(gold), "kl": float(answers.measures["kl_k3"].mean())}


def best_of_n(run: pipeline.DemoRun) -> dict[str, Any]:
    """Gold reward and divergence of the first reward model's favourite of n answers of the start, n = 1, 2, 4, …"""
    start = start_model(run)
    found = measure(run, start, start, "start", BEST_OF)
    model, _ = reward_model(run, "pairs")
    scored = model.score(run.world.prompts(TEST_PROMPTS, "test"), [list(row) for row in found["texts"]])
    proxy = np.array([each.normalised.tolist() for each in scored])
    path = [
        {"n": n, "kl": best_of_n_kl(n), "gold": float(best_of_n_means(proxy, found["gold"], n).mean())}
        for n in best_of_n_sizes(BEST_OF)
    ]
    return {"path": path, "end": path[-1]}


def align_once(output: Path, run: pipeline.DemoRun, name: str, rate: float) -> dict[str, Any]:
    """One run of the study: what it earns on its way, where it ends, and how long it took."""
    arm = ARMS[name]
    scorer, held_out = reward_model(run, arm.reward)
    start = start_model(run)
    begun, begun_wall = processor_seconds(), time.monotonic()
    clock: list[float] = []
    folder = output / "aligning" / f"{run.config.seed}-{name}-{rate:g}"
    shutil.rmtree(folder, ignore_errors=True)
    settings: dict[str, Any] = {
        "model": {"backbone": str(run.file("sft/model"))},
        "algorithm": {"kl_coefficient": 0.1} | dict(arm.algorithm),
        "sampling": {"max_new_tokens": run.config.max_new_tokens},
        "iterations": ITERATIONS,
        "prompts_per_iteration": PROMPTS,
        "samples_per_prompt": SAMPLES,
        "optimizer": {"learning_rate": rate, "schedule": "linear", "warmup": 2, "weight_decay": 0.0, "epsilon": 1e-5},
        "tokens_per_micro_batch": 8192,
        "evaluate_every": None,
        "save_every": None,
        "quiet": True,
        "output": folder,
        "seed": run.config.seed,
    }
    settings |= arm.options
    if settings["iterations"] == 1:
        settings["optimizer"] |= {"schedule": "constant", "warmup": 0.0}
    prompts = [PromptRecord(prompt=text) for text in run.world.prompts(ITERATIONS * PROMPTS)]
    parts = {"proxy": (normalised(scorer, Running(shift=False)), 1.0), "gold": (gold_of, 0.0)}
    config = AlignConfig.model_validate(settings)
    with values_from_zero() if "zero" in name else nullcontext():
        result = align.main(
            config,
            prompts=prompts,
            reward=combine(parts),
            on_iteration=lambda *_: clock.append(processor_seconds() - begun),
        )
    if not result.complete:
        sys.exit(result.exit_code)  # Stopped by a signal: half a run is no result.
    cost = {"seconds": processor_seconds() - begun, "wall": time.monotonic() - begun_wall, "memory": peak_memory()}
    steps = [entry for entry in read_metrics(folder / "metrics.jsonl") if "reward/gold" in entry]
    path = [
        {"kl": entry["objective/kl"], "gold": entry["reward/gold"], "seconds": spent}
        | {key: entry[name] for key, name in WATCHED.items() if name in entry}
        for entry, spent in zip(steps, clock, strict=True)
    ]
    found = measure(run, result.model, start, name, TEST_SAMPLES)
    shutil.rmtree(folder)
    end = {"kl": found["kl"], "gold": float(found["gold"].mean())}
    return {"accuracy": held_out, "path": path, "end": end} | cost


def values_from_zero() -> Any:
    """As Plaudit was before `plaudit.rollout.text_rollout.start_values`: what a critic at 0 costs."""
    return mock.patch("plaudit.training.align_job.start_values", lambda policy, found, **options: found)


def gold_of(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """The gold reward, watched and never learned from."""
    return [gold_reward(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]


def jobs(parts: Sequence[str], seeds: Sequence[int], rates: Sequence[float]) -> Iterator[tuple[str, int, float]]:
    """Every run that is asked for, seed by seed, in the order of asking; best of n with a part, or by its name."""
    wanted = [name for part in parts for name, arm in ARMS.items() if part in (arm.part, name)]
    for seed in seeds:
        if "best-of-n" in parts or len(wanted) > len(parts):
            yield "best-of-n", seed, 0.0
        yield from ((name, seed, rate) for name in dict.fromkeys(wanted) for rate in rates)


def run_all(output: Path, parts: Sequence[str], seeds: Sequence[int], rates: Sequence[float], minutes: float) -> None:
    """Make what is missing until the time is up."""
    begun = time.monotonic()
    worlds = cache(lambda seed: world_run(output, seed))
    for name, seed, rate in jobs(parts, seeds, rates):
        file = output / "results" / name / f"{seed}-{rate:g}.json"
        if file.exists():
            continue
        if time.monotonic() - begun > 60 * minutes:
            print("time is up; run it again to go on", flush=True)
            return
        run = worlds(seed)
        found = best_of_n(run) if name == "best-of-n" else align_once(output, run, name, rate)
        write_json(file, {"name": name, "seed": seed, "rate": rate, **found})
        print(name, seed, rate, {key: round(value, 2) for key, value in found["end"].items()}, flush=True)


def main(arguments: Sequence[str] | None = None, report: Callable[[Path], object] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "studies" / "alignment")
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument(
        "parts", nargs="+", help="algorithms, critic, families, ablations, reward-models, or single runs"
    )
    running.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    running.add_argument("--rates", type=float, nargs="+", default=[RATE], help="learning rates")
    running.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    commands.add_parser("table")
    commands.add_parser("second", help="the runs of this folder, from another machine, as tables of their own")
    given = parser.parse_args(arguments)
    if given.command in ("table", "second"):
        sys.path.insert(0, str(Path(__file__).parent))
        import alignment_report

        (alignment_report.write_report if given.command == "table" else alignment_report.write_second)(given.output)
    else:
        run_all(given.output, given.parts, given.seeds, given.rates, given.minutes)


if __name__ == "__main__":
    main()
