"""Log-probabilities of tokens and of sequences, without keeping a table of the size of the vocabulary."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# 64 MiB of float32 logits at a time: large enough for full speed, small beside any model that needs the chunking.
_LOGITS_PER_CHUNK = 1 << 24


def _chunk_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """Logits `[n, V]` in at least float32; the product itself runs in the dtype of `hidden`."""
    logits = hidden @ weight.to(hidden.dtype).T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class _TokenLogprobs(torch.autograd.Function):
    """Forward keeps one log-normaliser per token; backward computes each chunk of logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk: int,
        softcap: float | None,
    ) -> Tensor:
        parts, normalisers = [], []
        with torch.autocast(hidden.device.type, enabled=False):
            for rows, wanted in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True):
                logits = _chunk_logits(rows, weight, bias, softcap)
                normaliser = torch.logsumexp(logits, dim=-1)
                parts.append(logits.gather(1, wanted[:, None]).squeeze(1) - normaliser)
                normalisers.append(normaliser)
        ctx.save_for_backward(hidden, weight, bias, targets, torch.cat(normalisers))
        ctx.chunk, ctx.softcap = chunk, softcap
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normaliser = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=normaliser.dtype) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=normaliser.dtype) if bias is not None and need_bias else None
        for start in range(0, hidden.shape[0], ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits = _chunk_logits(hidden[part], weight, bias, ctx.softcap)
            # d log p_t / d logit_v = [v = t] - p_v
            grad_logits = torch.exp(logits - normaliser[part, None]).neg_()
            grad_logits.scatter_add_(
                1, targets[part, None], torch.ones_like(targets[part, None], dtype=grad_logits.dtype)
            )
            grad_logits *= grad[part, None]
            if ctx.softcap is not None:
                grad_logits *= 1 - (logits / ctx.softcap).square()
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad_logits @ weight.to(hidden.dtype)
            if grad_weight is not None:
                grad_weight += grad_logits.T @ hidden[part]
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Log-probability of each target token under the language-model head.

    Equation: `log p_n = z_{n,t_n} - log Σ_v exp z_{n,v}`, `z = h W^T + bias`, or `c tanh(z / c)` with a soft cap `c`
    (Gemma 2, arXiv:2408.00118). Gradients: `∂ log p / ∂ z_v = [v = t] - p_v`. At most `chunk x V` logits exist at any
    time, in forward and in backward, which computes them a second time.

    Args:
        hidden: `[N, H]`, the states that predict (see `PackedLayout.predictor_index`).
        weight: `[V, H]`, the output embedding; its gradient is summed in float32 (or its own wider dtype).
        targets: `[N]` int64, the tokens that were predicted; there is no ignored value: pass the rows that count.
        bias: `[V]` or None.
        chunk: rows of logits at a time; None takes as many as give 64 MiB of float32.
        softcap: the model's `final_logit_softcapping`, or None.

    Returns:
        `[N]` in float32 (float64 for float64 inputs), in nats.

    Raises:
        ValueError: if shapes do not fit or `chunk` is not positive.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [N, H] and [V, H]")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {tuple(targets.shape)} must be [N] = [{hidden.shape[0]}]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} must be [V] = [{weight.shape[0]}]")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    rows = chunk or max(1, _LOGITS_PER_CHUNK // weight.shape[0])
    result: Tensor = _TokenLogprobs.apply(hidden, weight, bias, targets, rows, softcap)  # type: ignore[no-untyped-call]
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
