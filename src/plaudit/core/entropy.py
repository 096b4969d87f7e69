"""Log-probabilities and entropies of a policy's tokens, without keeping a table of the size of the vocabulary."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from plaudit.core.vocabulary_head import HeadOptions, head_gradients, head_logits, head_options, head_product

# 256 MiB of float32: beside what a model keeps of as many tokens it is little, and a third of the head's work.
_LOGITS_KEPT_CPU = 1 << 26


class _PolicyTerms(torch.autograd.Function):
    """Forward keeps a normaliser and an entropy per token; backward computes each chunk of logits again.

    On a CPU a forward with few enough logits keeps their log-probabilities, chunk by chunk, and computes nothing again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: HeadOptions,
    ) -> tuple[Tensor, Tensor]:
        chosen, normalisers, entropies = [], [], []
        few = hidden.device.type == "cpu" and hidden.shape[0] * weight.shape[0] <= _LOGITS_KEPT_CPU
        ctx.kept = [] if few and any(ctx.needs_input_grad[:3]) else None
        with torch.autocast(hidden.device.type, enabled=False):
            product = head_product(hidden, weight, options)
            for rows, wanted in zip(
                torch.split(hidden, options.chunk), torch.split(targets, options.chunk), strict=True
            ):
                logits = head_logits(rows, product, bias, options)
                normaliser = torch.logsumexp(logits, dim=-1)
                logprobs = logits.sub_(normaliser[:, None])
                chosen.append(logprobs.gather(1, wanted[:, None]).squeeze(1))
                probabilities = logprobs.exp()
                if ctx.kept is not None:
                    ctx.kept.append(logprobs)
                # p log p is 0 where p is 0, also for logits of minus infinity.
                logprobs.clamp_(min=torch.finfo(logprobs.dtype).min)
                entropies.append(probabilities.mul_(logprobs).sum(-1).neg_())
                normalisers.append(normaliser)
        entropy = torch.cat(entropies)
        ctx.save_for_backward(hidden, weight, bias, targets, torch.cat(normalisers), entropy)
        ctx.options = options
        # An entropy that no loss reads costs nothing in the backward pass.
        ctx.set_materialize_grads(False)
        return torch.cat(chosen), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normaliser, entropy = ctx.saved_tensors
        grad = torch.zeros_like(normaliser) if grad_logprob is None else grad_logprob.to(normaliser.dtype)

        def slopes(part: slice, logits: Tensor) -> Tensor:
            logprobs = logits.sub_(normaliser[part, None])
            # d log p_t / d z_v = [v = t] - p_v and d H / d z_v = -p_v (log p_v + H)
            if grad_entropy is None:
                found: Tensor = logprobs.exp_().mul_(-grad[part, None])
            else:
                probabilities = logprobs.exp()
                surprise = torch.where(probabilities > 0, logprobs, 0.0) + entropy[part, None]
                found = -probabilities * (grad[part, None] + surprise * grad_entropy[part, None])
            return found.scatter_add_(1, targets[part, None], grad[part, None])

        def logits_of(part: slice) -> Tensor:
            found: Tensor = ctx.kept[part.start // ctx.options.chunk] + normaliser[part, None]
            return found

        logits = None if ctx.kept is None else logits_of
        # As in the forward: a normaliser of other logits than these would be no normaliser.
        with torch.autocast(hidden.device.type, enabled=False):
            found = head_gradients(hidden, weight, bias, ctx.options, ctx.needs_input_grad[:3], slopes, logits)
        return *found, None, None


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
    exist at any time, in forward and in backward, which computes them a second time; on a CPU a table of no more than
    256 MiB is kept instead.

    Args:
        hidden: `[N, H]`, the states that predict (see `PackedLayout.predictor_index`).
        weight: `[V, H]`, the output embedding; its gradient is summed in float32 (or its own wider dtype).
        targets: `[N]` int64, the tokens that were chosen.
        bias: `[V]` or None.
        temperature: `τ`, positive; the one that the tokens were drawn at.
        chunk: rows of logits at a time; None takes as many as give 64 MiB of float32 (8 on a CPU).
        softcap: the model's `final_logit_softcapping`, or None.

    Returns:
        `([N], [N])` in float32 (float64 for float64 inputs), in nats.

    Raises:
        ValueError: if shapes do not fit, or `chunk` or `temperature` is not positive.
    """
    options = head_options(hidden, weight, targets, bias, chunk=chunk, softcap=softcap, temperature=temperature)
    result: tuple[Tensor, Tensor] = _PolicyTerms.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, options
    )
    return result
