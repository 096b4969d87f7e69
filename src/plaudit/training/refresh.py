"""Refreshing the reward model during alignment: the policy's answers are judged, the reward model learns, and goes on.

It is Dyna for answers of one turn: the reward model is the model of the world, aligning with it is planning, and a
judgement is a real step. A policy drifts to answers unlike any that the model was trained on; there its scores mean
little (Gao et al. 2022, arXiv:2210.10760), and judgements of just these answers are worth most (Ziegler et al. 2019,
arXiv:1909.08593, section 2.3; Bai et al. 2022, arXiv:2204.05862, section 4.5, "online").
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plaudit.configs.align import AlignConfig
from plaudit.configs.model import RewardModelConfig
from plaudit.configs.refresh import RefreshConfig
from plaudit.configs.reward import RewardTrainingConfig
from plaudit.configs.training import OptimizerConfig
from plaudit.data.io import read_data
from plaudit.data.native import comparison_from_json, comparison_to_json
from plaudit.data.records import Comparison, Prompt, PromptRecord, preference_pairs
from plaudit.data.tokenising import TextTooLongError
from plaudit.evaluation.metrics import pair_accuracy
from plaudit.models.reward_model import RewardModel
from plaudit.rewards.annotators import Annotator, Question, QueueAnnotator, open_annotator
from plaudit.rewards.base import Sample
from plaudit.rewards.model import ModelReward
from plaudit.rollout.generate import generate
from plaudit.rollout.text_policy import TextPolicy
from plaudit.training import reward as reward_training
from plaudit.training.normalisation import score_statistics, texts_by_prompt
from plaudit.training.objectives import ABSOLUTE_LOSSES, loss_of
from plaudit.training.reading import source_configs
from plaudit.training.results import ENDS
from plaudit.training.signals import RunStopped

ANCHORS = 64
"""Records by whose completions the zero of the scale is held when the reward model learns."""


@dataclass
class RewardRefresher:
    """Asks, learns, and freezes the reward model again; its state goes into the run's checkpoints.

    Attributes:
        config: of the whole run; `settings` is its `refresh_reward`.
        reward: the reward model among the rewards.
        annotator: who judges.
        old: comparisons from before the run.
        new: those of this run, in order.
        asked: questions so far, which is what the budget counts: a judgement may come late.
        labels: judgements so far.
        refreshes: refreshes so far.
        last: the iteration after which the last one was made, or 0.
        unlogged: metrics of a refresh, until they are logged with the iteration that it came before.
        original: the weights at the run's start, where `settings.start` asks for them.
    """

    config: AlignConfig
    reward: ModelReward
    annotator: Annotator
    old: list[Comparison]
    new: list[Comparison] = field(default_factory=list)
    asked: int = 0
    labels: int = 0
    refreshes: int = 0
    last: int = 0
    unlogged: dict[str, float] = field(default_factory=dict)
    original: dict[str, torch.Tensor] | None = None

    def __post_init__(self) -> None:
        if self.settings.start == "original":
            self.original = _copied(self.reward.model)

    @property
    def settings(self) -> RefreshConfig:
        """The part of the configuration that is about this."""
        assert self.config.refresh_reward is not None
        return self.config.refresh_reward

    def due(self, iteration: int) -> bool:
        """Whether a refresh comes before iteration `iteration` (from 0), and there is something to ask or wait for."""
        open_ones = self.asked < self.settings.budget or bool(getattr(self.annotator, "asked", ()))
        return iteration > self.last and iteration % self.settings.every == 0 and open_ones

    def refresh(
        self,
        policy: TextPolicy,
        prompts: Sequence[PromptRecord],
        ids: Sequence[Sequence[int]],
        iteration: int,
        *,
        heed: Callable[[], object] = lambda: None,
    ) -> dict[str, float]:
        """One refresh.

        Args:
            policy: whose answers are judged.
            prompts: to draw from, with their token ids.
            ids: token ids of the prompts.
            iteration: that comes next.
            heed: is called wherever a refresh can be broken off, and raises `RunStopped` to do that.

        Returns:
            what also stands in `unlogged`: `refresh/labels` so far, `refresh/comparisons` of this time (of
            `refresh/asked`), and `refresh/accuracy_before` and `_after`, the share of their pairs that the reward
            model orders as they were judged.

        Raises:
            RunStopped: if a signal came; reward model and annotator are as they were before.
        """
        seed = int(np.random.SeedSequence([self.config.seed, 0x4EF4, iteration]).generate_state(1)[0])
        questions = self._questions(policy, prompts, ids, iteration, seed)
        before: dict[str, Any] = getattr(self.annotator, "state_dict", dict)()
        if isinstance(self.annotator, QueueAnnotator):
            self.annotator.heed = heed
        metrics = {"refresh/asked": float(len(questions))}
        try:
            heed()
            judged = self.annotator(questions)
            metrics["refresh/comparisons"] = float(len(judged))
            if judged:
                heed()
                metrics["refresh/accuracy_before"] = self.accuracy(judged)
                self._learn(judged, iteration, seed)
                metrics["refresh/accuracy_after"] = self.accuracy(judged)
        except RunStopped:
            # What was not learned from has to be handed out again when the run goes on.
            if before:
                self.annotator.load_state_dict(before)  # type: ignore[attr-defined]
            raise
        self.new += judged
        self.labels += len(judged)
        self.asked += len(questions)
        self.refreshes, self.last = self.refreshes + 1, iteration
        self.unlogged = metrics | {"refresh/labels": float(self.labels)}
        return self.unlogged

    def take_metrics(self) -> dict[str, float]:
        """What is to be logged with the iteration that has ended."""
        found, self.unlogged = self.unlogged, {}
        return found

    def accuracy(self, judged: Sequence[Comparison]) -> float:
        """Share of the judged, untied pairs that the reward model orders alike; 0.5 where there is none."""
        differences: list[float] = []
        for record in judged:
            score = self.reward([Sample(record.prompt, text, True, {}) for text in record.completions])
            totals = score.total.tolist()
            differences += [
                totals[better] - totals[worse]
                for better, worse in preference_pairs(record)
                if score.valid[better] and score.valid[worse]
            ]
        return pair_accuracy(np.array(differences)) if differences else 0.5

    def state_dict(self) -> dict[str, Any]:
        """Weights of the reward model, judgements as texts, counters, and the annotator's own state."""
        return {
            "weights": dict(self.reward.model.state_dict()),
            "new": [json.dumps(comparison_to_json(record)) for record in self.new],
            "asked": self.asked,
            "labels": self.labels,
            "refreshes": self.refreshes,
            "last": self.last,
            "unlogged": dict(self.unlogged),
            "annotator": getattr(self.annotator, "state_dict", dict)(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.reward.model.load_state_dict(state["weights"])
        self.reward.renew()
        self.new = [comparison_from_json(json.loads(text)) for text in state["new"]]
        self.asked, self.labels = state["asked"], state["labels"]
        self.refreshes, self.last = state["refreshes"], state["last"]
        self.unlogged = dict(state["unlogged"])
        if state["annotator"]:
            self.annotator.load_state_dict(state["annotator"])  # type: ignore[attr-defined]

    def _questions(
        self,
        policy: TextPolicy,
        prompts: Sequence[PromptRecord],
        ids: Sequence[Sequence[int]],
        iteration: int,
        seed: int,
    ) -> list[Question]:
        """Different answers of the policy to prompts drawn at random; one that was cut off is judged as it stands."""
        settings = self.settings
        wanted = min(settings.share(self.config.iterations, self.refreshes), settings.budget - self.asked, len(prompts))
        if wanted < 1:
            return []
        chosen = np.random.default_rng(seed).choice(len(prompts), size=wanted, replace=False).tolist()
        model = policy.policy.language_model
        found = generate(
            model,
            model.tokenizer,
            [ids[index] for index in chosen],
            samples_per_prompt=settings.completions,
            sampling=self.config.sampling.model_copy(
                update={"temperature": self.config.temperature(iteration), "seed": seed % 2**31}
            ),
            max_rows=policy.max_rows,
        )
        answers: list[dict[str, None]] = [{} for _ in chosen]
        for place, text in zip(found.prompt_index, found.text, strict=True):
            if text.strip():
                answers[place][text.strip()] = None
        return [
            _question(f"{iteration:05d}-{number:04d}", prompts[index].prompt, tuple(texts))
            for number, (index, texts) in enumerate(zip(chosen, answers, strict=True))
            if len(texts) > 1
        ]

    def _learn(self, judged: Sequence[Comparison], iteration: int, seed: int) -> None:
        """Train on the new comparisons and a share of the earlier ones, by the job that trained the model first.

        The scale keeps its zero: the mean score of earlier completions (without any, of those just judged) stays as it
        was. Otherwise 0 would mean something else after each refresh, and what is baselined by 0 would be thrown off.
        """
        settings, model = self.settings, self.reward.model
        before = _copied(model)
        earlier = [*self.old, *self.new]
        fresh = list(judged)
        if self.original is not None:
            model.load_state_dict(self.original)
            earlier, fresh = self.old, [*self.new, *judged]
        count = min(len(earlier), round(settings.old_per_new * len(fresh)))
        drawn = np.random.default_rng(seed + 1).choice(len(earlier), size=count, replace=False).tolist()
        records = [*fresh, *(earlier[index] for index in drawn)]
        folder = self.config.output / "refresh" / f"{iteration:05d}"
        training = self._training(folder, seed)
        # Absolute judgements say where the scale's zero is, comparisons do not.
        absolute = any(loss_of(record, training) in ABSOLUTE_LOSSES for record in records)
        anchor = {} if absolute else _anchor(model, self.old or judged)
        level = _level(model, anchor)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(_learns(name, model))
        result = reward_training.main(training, train=records, model=model)
        assert isinstance(result, reward_training.RewardTrainingResult)
        for entry in ("checkpoints", "model"):
            # Both are in the run's own checkpoints; what stays is how the training went.
            shutil.rmtree(folder / entry, ignore_errors=True)
        if result.stopped_by not in ENDS:
            model.load_state_dict(before)
            self.reward.renew()
            raise RunStopped(result.stopped_by)
        if anchor:
            model.normalisation_mean += _level(model, anchor) - level
        self.reward.renew()

    def _training(self, folder: Path, seed: int) -> RewardTrainingConfig:
        settings, config = self.settings, self.config
        return RewardTrainingConfig(
            # The model is handed over; this only says where it stands in the configuration of the run.
            model=RewardModelConfig(backbone=self.reward.name),
            output=folder,
            overwrite=True,
            seed=seed % 2**31,
            epochs=settings.epochs,
            normalise=False,
            records_per_step=settings.records_per_step,
            optimizer=OptimizerConfig(
                learning_rate=settings.learning_rate, head_learning_rate=settings.head_learning_rate, warmup=0.1
            ),
            tokens_per_micro_batch=config.tokens_per_micro_batch,
            precision=config.precision,
            device=config.device,
            threads=config.threads,
            on_error="skip",
            token_cache="off",
            quiet=True,
        )


def build_refresher(
    config: AlignConfig,
    reward: ModelReward,
    *,
    comparisons: Sequence[Comparison] | None = None,
    annotator: Annotator | None = None,
) -> RewardRefresher:
    """The refresher that a configuration describes.

    Args:
        config: with `refresh_reward`.
        reward: the reward model among the rewards.
        comparisons: earlier comparisons, instead of `refresh_reward.data`.
        annotator: instead of `refresh_reward.annotator`.

    Raises:
        ValueError: for comparisons that cannot be read or an annotator that is not there.
    """
    settings = config.refresh_reward
    assert settings is not None
    old = list(comparisons or ())
    if comparisons is None:
        for source in source_configs(config, settings.data):
            old += read_data(source).records
    judge = annotator or open_annotator(settings.annotator, config.output / "annotation", wait=settings.wait)
    return RewardRefresher(config, reward, judge, old)


def _question(number: str, prompt: Prompt, completions: tuple[str, ...]) -> Question:
    """A question whose id is its place in the run and a part of its hash: another run in the folder asks others."""
    digest = hashlib.sha256(repr((prompt, completions)).encode("utf-8", "surrogatepass")).hexdigest()
    return Question(id=f"{number}-{digest[:8]}", prompt=prompt, completions=completions)


def _learns(name: str, model: torch.nn.Module) -> bool:
    """Whether a parameter learns: all do, but beside adapters the backbone stays as it is."""
    adapters = any("lora_" in each for each, _ in model.named_parameters())
    return not adapters or "lora_" in name or not name.startswith("backbone")


def _anchor(model: RewardModel, records: Sequence[Comparison]) -> dict[Prompt, list[str]]:
    """Completions by prompt of the first of these records that the model can read."""
    readable = []
    for record in records:
        try:
            model.text_tokeniser.group(record.prompt, list(record.completions))
        except TextTooLongError:
            continue
        readable.append(record)
        if len(readable) == ANCHORS:
            break
    return texts_by_prompt(readable)


def _level(model: RewardModel, anchor: dict[Prompt, list[str]]) -> torch.Tensor:
    """The mean raw score of these completions, one number per output; 0 without any."""
    if not anchor:
        return torch.zeros_like(model.normalisation_mean)
    found = score_statistics(model, anchor, token_budget=8192).mean
    return torch.tensor(found).to(model.normalisation_mean)


def _copied(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
