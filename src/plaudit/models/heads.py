"""How a fresh reward head is initialised."""

from typing import TYPE_CHECKING

import torch

from plaudit.models.probe import probe_batch

if TYPE_CHECKING:
    from plaudit.models.reward_model import RewardModel

_LENGTHS = (3, 9, 5, 14, 2, 20, 7, 11)


@torch.no_grad()
def initialise_head(model: "RewardModel", *, seed: int = 0) -> None:
    """Draw `W`, set `b = 0`, so that the first scores have mean near 0 and variance one, whatever lies below.

    The published rule `W ~ N(0, 1/(H+1))` (Stiennon et al. 2020, appendix B; Ouyang et al. 2022) gives variance of
    order one only where states have unit entries that differ freely between texts. A sum over tokens is larger, a mean
    smaller, a normalisation layer may rescale, and all answers share their end token and so most of their last state.
    So, as Ziegler et al. (2019, section 2.1) do with samples, the scale is measured: random token texts, all with the
    same end token, go through backbone and aggregation; `W ~ N(0, I)` loses its part along their mean (scores start
    near 0 without a bias, which decoder classification heads cannot hold) and is divided by the standard deviation of
    the scores that it gives them. Where states do not differ at all the published rule is used.

    Args:
        model: the reward model; its head is changed in place.
        seed: seed of the draw; the global generator is left as it was.
    """
    device = model.head.weight.device
    if device.type == "meta":
        return
    training = model.training
    model.eval()
    vocabulary = min(len(model.tokenizer), int(model.backbone.get_input_embeddings().weight.shape[0]))  # type: ignore[operator]
    room = max(1, model.max_length - 6)
    batch = probe_batch(
        model.causal, [(4, [min(length, room) for length in _LENGTHS]) for _ in range(8)], max(vocabulary, 5)
    )
    end = model.text_tokeniser.end_token_id
    if end is None:
        end = model.tokenizer.sep_token_id or 0
    batch.input_ids[batch.layout.completion_ends - 1] = end
    batch = batch.to(device)
    pooled = model.aggregation(model.states(batch).float(), batch.layout)
    model.train(training)

    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(model.head.weight.shape, generator=generator).to(device)
    mean = pooled.mean(0)
    if weight.shape[1] > 1:
        weight -= (weight @ mean)[:, None] * mean / mean.square().sum().clamp(min=1e-12)
    spread = (pooled @ weight.T).std(0)
    published = (weight.shape[1] + 1) ** 0.5
    # Below one hundredth of what the published rule expects the spread is rounding, not information.
    degenerate = spread < 0.01 * pooled.square().mean().sqrt()
    scale = torch.where(degenerate | ~spread.isfinite(), torch.full_like(spread, published), spread)
    model.head.weight.copy_(weight / scale[:, None])
    model.head.bias.zero_()
