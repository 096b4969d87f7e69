"""A head that starts at its best on the untouched backbone: the convex half of "linear probing, then fine-tuning"."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plaudit.core.layout import scatter_to_table
from plaudit.data.splits import split_keys
from plaudit.data.targets import PreferenceTargets
from plaudit.models.reward_model import NATIVE, RewardModel
from plaudit.training.objectives import PreferenceObjective, select
from plaudit.training.reward_batches import RewardData

RIDGES = tuple(10.0 ** (power / 2) for power in range(-6, 5))
FOLDS = 5


@dataclass(frozen=True)
class HeadFit:
    """How a head was fitted.

    Attributes:
        weight: `[A, H]`, of the states as they are.
        bias: `[A]`.
        ridge: the chosen `λ`.
        losses: for each `λ` that was tried, the held-out loss over the folds, in nats per unit of weight.
    """

    weight: Tensor
    bias: Tensor
    ridge: float
    losses: dict[float, float]


@torch.no_grad()
def completion_features(model: RewardModel, data: RewardData, *, token_budget: int) -> Tensor:
    """`agg(h_1..h_T)` of every completion, without dropout: `[P, K, H]` float32 on the CPU, 0 where there is none."""
    width = max(group.num_slots for group in data.tokenised.groups)
    training = model.training
    model.eval()
    features = torch.zeros(0)
    for chosen, parts in data.tokenised.micro_batches(token_budget):
        for batch in data.micro_batch(chosen, parts).to(model.device).passes:
            pooled = model.aggregation(model.states(batch).float(), batch.layout).cpu()
            if not features.numel():
                features = torch.zeros(len(data.tokenised.groups), width, pooled.shape[1])
            table = scatter_to_table(pooled, batch.to("cpu").layout)
            features[list(chosen), : table.shape[1]] += table
    model.train(training)
    return features


def fit_linear(
    features: Tensor,
    targets: PreferenceTargets,
    losses: Sequence[str],
    objective: PreferenceObjective,
    *,
    attribute_weights: Sequence[float] = (),
    ridge: float,
    rows: Tensor | None = None,
    start: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The head that minimises the training loss plus a ridge, over features that do not change.

    Equation, with `s` the deviation of each feature over the completions: minimise over `W, b`
        `L(W f + b) / Σ_x w_x + (λ/2) Σ_a |W_a ⊙ s|²`,
    which is convex for every loss here but `davidson`'s and `rao_kupper`'s tie parameter, which stays as it is.

    Args:
        features: `[P, K, H]`.
        targets: of the same `P` prompts.
        losses: the name of each prompt's loss.
        objective: the training loss.
        attribute_weights: of the total; none for one output.
        ridge: `λ`, positive.
        rows: only these prompts, `[R]` int64.
        start: `W` and `b` of a neighbouring ridge, from which the way is short; none starts at 0.

    Returns:
        `W` `[A, H]` and `b` `[A]`, float32.
    """
    features = features.double()
    spread = features[targets.mask].std(0).clamp(min=1e-8) if targets.mask.sum() > 1 else features.new_ones(())
    scaled, chosen = features / spread, list(losses)
    if rows is not None:
        scaled, targets, chosen = scaled[rows], select(targets, rows), [losses[row] for row in rows.tolist()]
    outputs = max(1, len(attribute_weights))
    weight = scaled.new_zeros(outputs, scaled.shape[-1], requires_grad=True)
    bias = scaled.new_zeros(outputs, requires_grad=True)
    if start is not None:
        with torch.no_grad():
            weight.copy_(start[0] * spread)
            bias.copy_(start[1])
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        loss = linear_loss(scaled, weight, bias, targets, chosen, objective, attribute_weights)
        total = loss + ridge / 2 * weight.square().sum()
        weight.grad, bias.grad = torch.autograd.grad(total, (weight, bias), materialize_grads=True)
        return total.detach()

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return (weight.detach() / spread).float(), bias.detach().float()


def linear_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: PreferenceTargets,
    losses: Sequence[str],
    objective: PreferenceObjective,
    attribute_weights: Sequence[float] = (),
    *,
    smoothing: bool = True,
) -> Tensor:
    """The training loss per unit of weight of a linear head: features `[P, K, H]`, `W` `[A, H]`, `b` `[A]`; scalar."""
    scores = features @ weight.T + bias
    total = scores @ scores.new_tensor(attribute_weights) if attribute_weights else scores.squeeze(-1)
    table = scores if attribute_weights else total
    normaliser = targets.weights.sum().item()
    loss: Tensor = objective(table, total, targets, losses, normaliser=normaliser, smoothing=smoothing)[0]
    return loss


def choose_ridge(
    features: Tensor,
    targets: PreferenceTargets,
    losses: Sequence[str],
    keys: Sequence[str],
    objective: PreferenceObjective,
    *,
    attribute_weights: Sequence[float] = (),
) -> dict[float, float]:
    """The held-out loss of `RIDGES`, cross-fitted over the prompts of the training records.

    From the largest `λ` down, each fit starting from the one before, until two in a row are worse than the best: small
    ones take longest to fit.

    Args:
        features: `[P, K, H]`.
        targets: of the same `P` prompts.
        losses: the name of each prompt's loss.
        keys: for each of them what must not be split, e.g. the prompt.
        objective: the training loss.
        attribute_weights: of the total; none for one output.

    Returns:
        Loss by `λ`, of those that were tried; nothing where there are fewer than two keys per fold, and so nothing to
        choose by.
    """
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    if len(numbers) < 2 * FOLDS:
        return {}
    fold_of = torch.tensor([numbers[key] % FOLDS for key in keys])
    sides = [((fold_of != fold).nonzero()[:, 0], (fold_of == fold).nonzero()[:, 0]) for fold in range(FOLDS)]
    starts: list[tuple[Tensor, Tensor] | None] = [None] * FOLDS
    found: dict[float, float] = {}
    for ridge in sorted(RIDGES, reverse=True):
        found[ridge] = 0.0
        for fold, (inside, outside) in enumerate(sides):
            weight, bias = starts[fold] = fit_linear(
                features,
                targets,
                losses,
                objective,
                attribute_weights=attribute_weights,
                ridge=ridge,
                rows=inside,
                start=starts[fold],
            )
            held_out = select(targets, outside)
            share = held_out.weights.sum().item() / targets.weights.sum().item()
            with torch.no_grad():
                loss = linear_loss(
                    features[outside],
                    weight,
                    bias,
                    held_out,
                    [losses[row] for row in outside.tolist()],
                    objective,
                    attribute_weights,
                    smoothing=False,
                )
            found[ridge] += share * loss.item()
        last = list(found.values())[-2:]
        if len(last) == 2 and min(last) > min(found.values()):
            break
    return found


def fit_head(model: RewardModel, objective: PreferenceObjective, data: RewardData, *, token_budget: int) -> HeadFit:
    """Put the head where its loss is least on the untouched backbone, by one forward pass over the training data.

    A random head sends noise through the backbone until it has found its direction, and distorts what the backbone
    knew; a fitted one does not (Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and Underperform
    Out-of-Distribution"). The ridge is chosen by cross-fitting over prompts; `λ = 1` where there are too few records.

    Args:
        model: its head is changed in place.
        objective: the training loss.
        data: the training records.
        token_budget: most tokens of one forward pass.

    Raises:
        ValueError: for a model whose head belongs to its own architecture.
    """
    if model.parts.aggregation == NATIVE:
        raise ValueError("head_start: fitted needs a linear reward head; this model brings a head of its own kind")
    features = completion_features(model, data, token_budget=token_budget)
    targets = data.targets(range(len(data.losses)), features.shape[1])
    weights = model.parts.attribute_weights
    device = next(iter(objective.parameters()), torch.zeros(())).device
    objective.to("cpu")
    keys = split_keys(data.tokenised.records, "prompt")
    tried = choose_ridge(features, targets, data.losses, keys, objective, attribute_weights=weights)
    ridge = min(tried, key=lambda each: tried[each]) if tried else 1.0
    weight, bias = fit_linear(features, targets, data.losses, objective, attribute_weights=weights, ridge=ridge)
    objective.to(device)
    with torch.no_grad():
        model.head.weight.copy_(weight)
        model.head.bias.copy_(bias)
    return HeadFit(weight, bias, ridge, tried)
