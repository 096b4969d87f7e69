"""Which models are packed: an allow-list, a count of attention calls, and an equality probe longer than the window."""

import copy
import json
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModel

from plaudit.core.layout import PackedBatch
from plaudit.data.packing import pack_groups
from plaudit.data.tokenising import TokenisedBlock, TokenisedGroup
from plaudit.models.attention_backends import require_backend
from plaudit.models.packed_attention import PACKED_ATTENTION, register_packed_attention
from plaudit.models.states import packed_states, padded_states, takes_argument, unwrap

logger = logging.getLogger(__name__)

PACKABLE = frozenset(
    {
        "albert", "arcee", "bert", "camembert", "cohere", "cohere2", "deepseek_v3", "electra", "ernie", "ernie4_5",
        "eurobert", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss",
        "granite", "helium", "llama", "mistral", "mixtral", "modernbert", "modernbert-decoder", "olmo", "olmo2",
        "olmo3", "olmoe", "opt", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "roberta",
        "seed_oss", "smollm3", "starcoder2", "xlm-roberta"
    }
)  # fmt: skip
"""Architectures whose packed forward and gradients were held against plain rows. Others are packed only on request,
and then only after the probe: some (MPT, GPT-Neo's local layers, Llama 4, Qwen3-Next) would be silently wrong."""

TWIN_SIZES: dict[str, int] = {
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "dim": 32, "word_embed_proj_dim": 32, "embedding_size": 32,
    "intermediate_size": 48, "ffn_dim": 48, "n_inner": 48, "hidden_dim": 48,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
    "num_attention_heads": 4, "n_head": 4, "num_key_value_heads": 2, "head_dim": 8,
    "num_hidden_layers": 2, "n_layer": 2, "vocab_size": 64, "sliding_window": 5, "local_attention": 8,
    "attention_chunk_size": 5,
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
}  # fmt: skip

_verdicts: dict[str, str | None] = {}


def probe_batch(causal: bool, lengths: Sequence[tuple[int, Sequence[int]]], vocab: int = 64) -> PackedBatch:
    """A packed batch of fixed pseudo-random token ids.

    Args:
        causal: False gives every completion its own block, as encoders need.
        lengths: per prompt its length and those of its completions, in tokens.
        vocab: ids are drawn from `3..vocab-1`.

    Returns:
        The batch, on the CPU.
    """
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(3, vocab, (length,), generator=generator).tolist()

    groups = []
    for prompt_length, completion_lengths in lengths:
        prompt, completions = ids(prompt_length), [ids(length) for length in completion_lengths]
        slots = list(range(len(completions)))
        if causal:
            blocks = [TokenisedBlock(prefix=prompt, completions=completions, slots=slots)]
        else:
            blocks = [
                TokenisedBlock(prefix=prompt, completions=[completion], slots=[slot])
                for slot, completion in zip(slots, completions, strict=True)
            ]
        groups.append(TokenisedGroup(blocks=tuple(blocks)))
    return pack_groups(groups, causal=causal)


def tiny_twin(config: Any) -> nn.Module:
    """A model of the same architecture shrunk to a few thousand weights, its sliding window shrunk to 5 tokens.

    Layer kinds (full, sliding) are kept, one layer of each; switches such as soft-caps, grouped queries, partial
    rotary embeddings and tied layers stay as they are. Its weights are random from a fixed seed.

    Args:
        config: the real model's transformers configuration.

    Returns:
        The twin, float32, in evaluation mode, with packed attention.
    """
    values = copy.deepcopy(config.to_dict())
    for key, size in TWIN_SIZES.items():
        if isinstance(values.get(key), int) and not isinstance(values[key], bool):
            same_heads = key == "num_key_value_heads" and values[key] == config.num_attention_heads
            values[key] = 4 if same_heads else size
    kinds = values.get("layer_types")
    if kinds:
        # Keep the order of first appearance; a model of one kind keeps two layers of it.
        distinct = list(dict.fromkeys(kinds))
        values["layer_types"] = distinct if len(distinct) > 1 else distinct * 2
        values["num_hidden_layers"] = len(values["layer_types"])
    if "qk_rope_head_dim" in values:
        values["head_dim"] = values["qk_rope_head_dim"]
    for key in [key for key in values if key.endswith("_token_id")]:
        values[key] = 0 if key == "pad_token_id" else 1
    for key in ("rope_parameters", "rope_scaling"):
        values[key] = _plain_rope(values.get(key))
    values = {key: value for key, value in values.items() if value is not None and key != "dtype"}
    twin_config = type(config)(**values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        twin = AutoModel.from_config(twin_config, dtype=torch.float32, attn_implementation=PACKED_ATTENTION)
        # The usual initialisation is so small that a wrong mask would hide below the tolerance.
        for parameter in twin.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
    return twin.eval()  # type: ignore[no-any-return]


def _plain_rope(value: Any) -> Any:
    # Long-context factors are sized for the real head; they have no bearing on packing.
    if not isinstance(value, dict):
        return value
    if "rope_type" in value:
        kept = {key: value[key] for key in ("rope_theta", "partial_rotary_factor") if key in value}
        return {"rope_type": "default", **kept}
    return {key: _plain_rope(inner) for key, inner in value.items()}


def equality_fault(model: nn.Module, batch: PackedBatch, tolerance: float) -> str | None:
    """Hold the packed forward against the plain padded one.

    Args:
        model: a base model that uses packed attention.
        batch: the tokens to compare on.
        tolerance: largest difference allowed, as a share of the largest state.

    Returns:
        None where they agree, otherwise what was wrong.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            packed = packed_states(model, batch).float()
            padded = padded_states(model, batch).float()
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        model.train(training)
    difference = (packed - padded).abs().max().item()
    scale = padded.abs().max().item()
    if not difference <= tolerance * max(scale, 1e-6):
        return f"packed and padded states differ by {difference:.2g} at a scale of {scale:.2g}"
    return None


def packing_fault(model: nn.Module, *, causal: bool, require_known: bool = True) -> str | None:
    """Why this model cannot be packed, or None where it can; on success the model is left using packed attention.

    Three tests: its architecture is on the allow-list (unless `require_known` is False); a tiny twin, with a window
    far shorter than the probe, gives equal states; and so does the model itself on a short probe in its own dtype.

    Args:
        model: a transformers base model, with or without adapters.
        causal: whether it is a decoder.
        require_known: insist on the allow-list.

    Returns:
        None, or the reason in words.
    """
    plain = unwrap(model)
    config: Any = plain.config
    if require_known and config.model_type not in PACKABLE:
        return f"the architecture {config.model_type!r} is not on the list of those known to be right"
    if not takes_argument(model, "position_ids"):
        return f"{type(plain).__name__} takes no position_ids"
    register_packed_attention()
    fault = twin_fault(config, causal)
    if fault is not None:
        return f"the probe on a tiny twin failed: {fault}"
    before = config._attn_implementation
    plain.set_attn_implementation(PACKED_ATTENTION)  # type: ignore[operator]
    device = next(model.parameters()).device
    if device.type != "meta":
        vocab = min(int(config.get_text_config().vocab_size), 1000)
        batch = probe_batch(causal, [(5, [3, 1, 4]), (1, [2, 6])], vocab).to(device)
        exact = next(model.parameters()).dtype == torch.float32
        fault = equality_fault(model, batch, tolerance=1e-4 if exact else 0.1)
    if fault is not None:
        plain.set_attn_implementation(before)  # type: ignore[operator]
        return f"the probe on the model failed: {fault}"
    return None


def twin_fault(config: Any, causal: bool) -> str | None:
    """The equality probe on a tiny twin of this architecture, remembered by configuration; None where it passes."""
    key = json.dumps(config.to_dict(), sort_keys=True, default=str)
    if key not in _verdicts:
        batch = probe_batch(causal, [(9, [7, 1, 12, 3]), (1, [1, 9]), (14, [2])], vocab=64)
        try:
            twin = tiny_twin(config)
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
            _verdicts[key] = f"no twin could be built ({type(error).__name__}: {error})"
        else:
            _verdicts[key] = equality_fault(twin, batch, tolerance=1e-5)
    return _verdicts[key]


def backend_name(attn_implementation: str) -> str:
    """The packed backend that an `attn_implementation` asks for: `auto` unless it names one."""
    return "auto" if attn_implementation in ("auto", "packed", "padded") else attn_implementation


def choose_path(model: nn.Module, *, causal: bool, wanted: str = "auto") -> bool:
    """Decide between the packed and the padded path, and log which was taken and why.

    Args:
        model: the base model.
        causal: whether it is a decoder.
        wanted: `auto`, `padded`, `packed` (also off the allow-list, if the probe passes), or the name of a packed
            backend, which means `packed` with that backend.

    Returns:
        True for packed.

    Raises:
        ValueError: if `packed` was asked for and the model cannot be packed, or for an unknown name.
    """
    name = type(unwrap(model)).__name__
    require_backend(backend_name(wanted))
    if wanted == "padded":
        logger.info("%s: padded rows, as asked", name)
        return False
    fault = packing_fault(model, causal=causal, require_known=wanted == "auto")
    if fault is None:
        logger.info("%s: packed attention; the equality probe passed", name)
        return True
    if wanted != "auto":
        raise ValueError(f"{name} cannot be packed: {fault}; use attn_implementation: padded")
    logger.warning("%s: padded rows, because %s", name, fault)
    return False
