"""Log-probabilities of tokens and of sequences, without keeping a table of the size of the vocabulary."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from plaudit.core.vocabulary_head import HeadOptions, head_gradients, head_logits, head_options, head_product


class _TokenLogprobs(torch.autograd.Function):
    """Forward keeps one log-normaliser per token; backward computes each chunk of logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: HeadOptions,
    ) -> Tensor:
        parts, normalisers = [], []
        with torch.autocast(hidden.device.type, enabled=False):
            product = head_product(hidden, weight, options)
            for rows, wanted in zip(
                torch.split(hidden, options.chunk), torch.split(targets, options.chunk), strict=True
            ):
                logits = head_logits(rows, product, bias, options)
                normaliser = torch.logsumexp(logits, dim=-1)
                parts.append(logits.gather(1, wanted[:, None]).squeeze(1) - normaliser)
                normalisers.append(normaliser)
        ctx.save_for_backward(hidden, weight, bias, targets, torch.cat(normalisers))
        ctx.options = options
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normaliser = ctx.saved_tensors

        def slopes(part: slice, logits: Tensor) -> Tensor:
            # d log p_t / d z_v = [v = t] - p_v
            found = logits.sub_(normaliser[part, None]).exp_().neg_()
            wanted = targets[part, None]
            found.scatter_add_(1, wanted, torch.ones_like(wanted, dtype=found.dtype))
            return found.mul_(grad[part, None])

        # As in the forward: a normaliser of other logits than these would be no normaliser.
        with torch.autocast(hidden.device.type, enabled=False):
            found = head_gradients(hidden, weight, bias, ctx.options, ctx.needs_input_grad[:3], slopes)
        return *found, None, None


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Log-probability of each target token under the language-model head.

    Equation: `log p_n = z_{n,t_n} - log Σ_v exp z_{n,v}`, `z = (h W^T + bias) / τ`, with `c tanh(· / c)` before the
    division where there is a soft cap `c` (Gemma 2, arXiv:2408.00118). Gradients: `∂ log p / ∂ z_v = [v = t] - p_v`. At
    most `chunk x V` logits exist at any time, in forward and in backward, which computes them a second time.

    Args:
        hidden: `[N, H]`, the states that predict (see `PackedLayout.predictor_index`).
        weight: `[V, H]`, the output embedding; its gradient is summed in float32 (or its own wider dtype).
        targets: `[N]` int64, the tokens that were predicted; there is no ignored value: pass the rows that count.
        bias: `[V]` or None.
        temperature: `τ`, positive.
        chunk: rows of logits at a time; None takes as many as give 64 MiB of float32 (8 on a CPU).
        softcap: the model's `final_logit_softcapping`, or None.

    Returns:
        `[N]` in float32 (float64 for float64 inputs), in nats.

    Raises:
        ValueError: if shapes do not fit, or `chunk` or `temperature` is not positive.
    """
    options = head_options(hidden, weight, targets, bias, chunk=chunk, softcap=softcap, temperature=temperature)
    result: Tensor = _TokenLogprobs.apply(hidden, weight, bias, targets, options)  # type: ignore[no-untyped-call]
    return result


def sequence_logprobs(logprobs: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """Log-probability of whole sequences: `log p(y) = Σ_t log p(y_t | y_<t)`.

    Args:
        logprobs: `[N]` log-probabilities of tokens, in any order.
        sequence_ids: `[N]` int64, the sequence of each token, in `0..num_sequences-1`.
        num_sequences: how many sequences there are; one without tokens gets 0.

    Returns:
        `[num_sequences]`, in nats, differentiable.

    Raises:
        ValueError: if shapes differ.
    """
    if logprobs.ndim != 1 or logprobs.shape != sequence_ids.shape:
        raise ValueError(f"logprobs {tuple(logprobs.shape)} and sequence_ids {tuple(sequence_ids.shape)} must be [N]")
    return logprobs.new_zeros(num_sequences).index_add(0, sequence_ids, logprobs)
