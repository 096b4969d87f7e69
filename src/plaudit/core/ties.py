"""Two classical models of pairs that may be tied, and the tie parameter that they share a name for."""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus


def davidson_logprobs(differences: Tensor, tie_parameter: Tensor | float) -> Tensor:
    """Davidson's extension of Bradley-Terry to ties.

    Equation, with `π = exp r`, `ν = exp(tie_parameter)`:
        `P(i≻j) = π_i / (π_i + π_j + ν √(π_i π_j))`, `P(i~j) = ν √(π_i π_j) / (π_i + π_j + ν √(π_i π_j))`,
    which in `d = r_i - r_j` is a softmax over `(d/2, tie_parameter, -d/2)`.
    Source: Davidson, "On extending the Bradley-Terry model to accommodate ties in paired comparison experiments",
    JASA 65 (1970).

    Args:
        differences: any shape, `r_i - r_j`.
        tie_parameter: a scalar, `log ν`; any real number; -inf would be no ties at all.

    Returns:
        `[..., 3]`: log-probabilities that i wins, that they tie, that j wins.
    """
    half = differences / 2
    tie = torch.as_tensor(tie_parameter, dtype=differences.dtype, device=differences.device).expand_as(half)
    return torch.log_softmax(torch.stack([half, tie, -half], dim=-1), dim=-1)


def rao_kupper_logprobs(differences: Tensor, tie_parameter: Tensor | float) -> Tensor:
    """Rao and Kupper's extension of Bradley-Terry: differences below a threshold of perception are ties.

    Equation, with `π = exp r`, `τ = softplus(tie_parameter)`, `θ = exp τ ≥ 1`:
        `P(i≻j) = π_i / (π_i + θ π_j) = σ(d - τ)`,
        `P(i~j) = (θ² - 1) π_i π_j / ((π_i + θ π_j)(π_j + θ π_i)) = (θ² - 1) P(i≻j) P(j≻i)`.
    Source: Rao and Kupper, "Ties in paired-comparison experiments: a generalization of the Bradley-Terry model",
    JASA 62 (1967). The softplus, ours, keeps `θ ≥ 1` for a parameter that is learned without bounds.

    Args:
        differences: any shape, `r_i - r_j`.
        tie_parameter: a scalar, any real number.

    Returns:
        `[..., 3]`: log-probabilities that i wins, that they tie, that j wins.
    """
    raw = torch.as_tensor(tie_parameter, dtype=differences.dtype, device=differences.device)
    threshold = softplus(raw)
    win, loss = logsigmoid(differences - threshold), logsigmoid(-differences - threshold)
    # log(θ² - 1) = log(e^{2τ} - 1); for very negative parameters τ = e^raw underflows and the limit log 2τ is exact.
    tiny = raw < -12
    safe = torch.where(tiny, torch.ones_like(threshold), threshold)
    log_theta_squared_minus_one = torch.where(tiny, math.log(2) + raw, 2 * safe + torch.log(-torch.expm1(-2 * safe)))
    return torch.stack([win, log_theta_squared_minus_one + win + loss, loss], dim=-1)


TIE_MODELS = {"davidson": davidson_logprobs, "rao_kupper": rao_kupper_logprobs}


def initial_tie_parameter(ties: str, tie_rate: float) -> float:
    """The tie parameter at which two *equal* scores tie with probability `tie_rate`: a good place to start learning.

    Equation: Davidson `ν/(2+ν) = t`, so `ν = 2t/(1-t)`; Rao-Kupper `(θ-1)/(θ+1) = t`, so `θ = (1+t)/(1-t)`.

    Args:
        ties: `davidson` or `rao_kupper`.
        tie_rate: in (0, 1); the share of judged pairs that people tied is a lower bound for it.

    Returns:
        the unconstrained parameter that the two functions of this file take.

    Raises:
        ValueError: for an unknown model or a rate outside (0, 1).
    """
    if ties not in TIE_MODELS:
        raise ValueError(f"ties must be one of {sorted(TIE_MODELS)}, got {ties!r}")
    if not 0 < tie_rate < 1:
        raise ValueError(f"tie_rate must lie strictly between 0 and 1, got {tie_rate}")
    if ties == "davidson":
        return math.log(2 * tie_rate / (1 - tie_rate))
    return math.log(math.expm1(math.log((1 + tie_rate) / (1 - tie_rate))))
