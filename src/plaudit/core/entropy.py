"""Log-probabilities and entropies of a policy's tokens, without keeping a table of the size of the vocabulary."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_LOGITS_PER_CHUNK = 1 << 24


def _scaled_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, temperature: float
) -> Tensor:
    """Logits over the temperature, `[n, V]` in at least float32; the product runs in the dtype of `hidden`."""
    logits = hidden @ weight.to(hidden.dtype).T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits if temperature == 1.0 else logits / temperature


class _PolicyTerms(torch.autograd.Function):
    """Forward keeps a normaliser and an entropy per token; backward computes each chunk of logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk: int,
        softcap: float | None,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        chosen, normalisers, entropies = [], [], []
        with torch.autocast(hidden.device.type, enabled=False):
            for rows, wanted in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True):
                logits = _scaled_logits(rows, weight, bias, softcap, temperature)
                normaliser = torch.logsumexp(logits, dim=-1)
                logprobs = logits - normaliser[:, None]
                chosen.append(logprobs.gather(1, wanted[:, None]).squeeze(1))
                # p log p is 0 where p is 0, also for logits of minus infinity.
                finite = logprobs.clamp(min=torch.finfo(logprobs.dtype).min)
                entropies.append(-(logprobs.exp() * finite).sum(-1))
                normalisers.append(normaliser)
        entropy = torch.cat(entropies)
        ctx.save_for_backward(hidden, weight, bias, targets, torch.cat(normalisers), entropy)
        ctx.chunk, ctx.softcap, ctx.temperature = chunk, softcap, temperature
        # An entropy that no loss reads costs nothing in the backward pass.
        ctx.set_materialize_grads(False)
        return torch.cat(chosen), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normaliser, entropy = ctx.saved_tensors
        if grad_logprob is None:
            grad_logprob = torch.zeros_like(normaliser)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=normaliser.dtype) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=normaliser.dtype) if bias is not None and need_bias else None
        for start in range(0, hidden.shape[0], ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits = _scaled_logits(hidden[part], weight, bias, ctx.softcap, ctx.temperature)
            logprobs = logits - normaliser[part, None]
            probabilities = logprobs.exp()
            # d log p_t / d z_v = [v = t] - p_v and d H / d z_v = -p_v (log p_v + H)
            grad_logits = -probabilities * grad_logprob[part, None]
            grad_logits.scatter_add_(1, targets[part, None], grad_logprob[part, None].to(grad_logits.dtype))
            if grad_entropy is not None:
                surprise = torch.where(probabilities > 0, logprobs, 0.0) + entropy[part, None]
                grad_logits -= probabilities * surprise * grad_entropy[part, None]
            if ctx.softcap is not None:
                grad_logits *= 1 - (logits * (ctx.temperature / ctx.softcap)).square()
            grad_logits /= ctx.temperature
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
            *(None,) * 4,
        )


def logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token and the entropy of the distribution it was chosen from.

    Equations, with `z = (h W^T + bias) / τ` (soft-capped before the division where the model does so):
    `log p_n = z_{n,t_n} - log Σ_v exp z_{n,v}` and `H_n = -Σ_v p_{n,v} log p_{n,v}`.
    Gradients: `∂ log p / ∂ z_v = [v = t] - p_v` and `∂ H / ∂ z_v = -p_v (log p_v + H)`. At most `chunk x V` logits
    exist at any time, in forward and in backward, which computes them a second time.

    Args:
        hidden: `[N, H]`, the states that predict (see `PackedLayout.predictor_index`).
        weight: `[V, H]`, the output embedding; its gradient is summed in float32 (or its own wider dtype).
        targets: `[N]` int64, the tokens that were chosen.
        bias: `[V]` or None.
        temperature: `τ`, positive; the one that the tokens were drawn at.
        chunk: rows of logits at a time; None takes as many as give 64 MiB of float32.
        softcap: the model's `final_logit_softcapping`, or None.

    Returns:
        `([N], [N])` in float32 (float64 for float64 inputs), in nats.

    Raises:
        ValueError: if shapes do not fit, or `chunk` or `temperature` is not positive.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [N, H] and [V, H]")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {tuple(targets.shape)} must be [N] = [{hidden.shape[0]}]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} must be [V] = [{weight.shape[0]}]")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    rows = chunk or max(1, _LOGITS_PER_CHUNK // weight.shape[0])
    result: tuple[Tensor, Tensor] = _PolicyTerms.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, rows, softcap, temperature
    )
    return result
