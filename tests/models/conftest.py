"""Tiny models and tokenizers that every model test shares."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from plaudit.core.layout import PackedBatch
from plaudit.data.packing import pack_groups
from plaudit.data.tokenising import TokenisedBlock, TokenisedGroup

_SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 128,
}  # fmt: skip
_WINDOWED = {**_SMALL, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
_GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
_BERT = {key: value for key, value in _SMALL.items() if key not in ("num_key_value_heads",)}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _SMALL),
    "qwen2": ("qwen2", {**_SMALL, "use_sliding_window": False}),
    "qwen2-window": (
        "qwen2",
        {**_SMALL, "use_sliding_window": True, "sliding_window": 4, "layer_types": _WINDOWED["layer_types"]},
    ),
    "qwen3": ("qwen3", {**_SMALL, "head_dim": 8}),
    "mistral-window": ("mistral", {**_SMALL, "sliding_window": 4, "head_dim": 8}),
    "gemma": ("gemma", {**_SMALL, "head_dim": 8}),
    "gemma2-window-softcap": ("gemma2", {**_WINDOWED, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}),
    "gemma3-window": ("gemma3_text", {**_WINDOWED, "query_pre_attn_scalar": 8}),
    "gpt2": ("gpt2", _GPT2),
    "gpt_neox": ("gpt_neox", {k: v for k, v in _SMALL.items() if k != "num_key_value_heads"}),
    "phi": ("phi", _SMALL),
    "phi3-window": ("phi3", {**_SMALL, "sliding_window": 4}),
    "mixtral-window": ("mixtral", {**_SMALL, "sliding_window": 4, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "qwen3_moe",
        {**_SMALL, "head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "gpt_oss-window-sinks": (
        "gpt_oss",
        {**_WINDOWED, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": {"rope_type": "default"}},
    ),
    "bert": ("bert", _BERT),
    "modernbert-window": (
        "modernbert",
        {**_BERT, "local_attention": 6, "layer_types": _WINDOWED["layer_types"], "cls_token_id": 1, "sep_token_id": 2},
    ),
    "roberta": ("roberta", {**_BERT, "pad_token_id": 1}),
}
"""Tiny configurations by name; windows are shorter than the texts that the tests use."""


def tiny_base(name: str, *, attn_implementation: str | None = None, seed: int = 0) -> Any:
    """A tiny base model with weights large enough that a wrong mask shows; evaluation mode, float32."""
    model_type, sizes = ARCHITECTURES[name]
    torch.manual_seed(seed)
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    model = AutoModel.from_config(AutoConfig.for_model(model_type, **sizes), dtype=torch.float32, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2, generator=generator)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


def random_groups(shapes: list[tuple[int, list[int]]], *, causal: bool = True, seed: int = 0) -> list[TokenisedGroup]:
    """Groups of random token ids in `3..63` with these prompt and completion lengths."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(3, 64, (length,), generator=generator).tolist()

    groups = []
    for prompt_length, lengths in shapes:
        prompt, completions = ids(prompt_length), [ids(length) for length in lengths]
        if causal:
            blocks = [TokenisedBlock(prompt, completions, list(range(len(completions))))]
        else:
            blocks = [TokenisedBlock(prompt, [answer], [slot]) for slot, answer in enumerate(completions)]
        groups.append(TokenisedGroup(tuple(blocks)))
    return groups


def random_batch(shapes: list[tuple[int, list[int]]], *, causal: bool = True, seed: int = 0) -> PackedBatch:
    """The same, packed."""
    return pack_groups(random_groups(shapes, causal=causal, seed=seed), causal=causal)


def texts_of(batch: PackedBatch) -> list[torch.Tensor]:
    """Each completion behind its own prompt as one plain row of ids, without any padding."""
    layout, ids = batch.layout, batch.input_ids
    return [
        torch.cat(
            (
                ids[layout.prefix_starts[c] : layout.prefix_ends[c]],
                ids[layout.completion_starts[c] : layout.completion_ends[c]],
            )
        )
        for c in range(layout.num_completions)
    ]


WORDS = (
    *("the", "a", "cat", "dog", "sat", "ran", "on", "mat", "why", "is", "it", "so"),
    *("good", "bad", "very", "yes", "no", "thanks", "help", "me", "please", "here", "you", "go"),
)


def word_tokenizer(*, encoder: bool = False, pad: str | None = "<pad>") -> Any:
    """One token per word, an end token, and for encoders the usual specials around a pair of texts."""
    specials = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"] if encoder else ["<unk>", "<s>", "</s>"]
    if pad and not encoder and pad not in specials:
        specials.append(pad)
    vocabulary = {word: index for index, word in enumerate([*specials, *WORDS])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token=specials[0]))
    inner.pre_tokenizer = Whitespace()
    if encoder:
        inner.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=inner,
            unk_token="[UNK]",
            cls_token="[CLS]",
            sep_token="[SEP]",
            pad_token="[PAD]",
            model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token=pad
    )


@pytest.fixture
def decoder_folder(tmp_path: Any) -> str:
    """A folder with a decoder's tokenizer."""
    folder = tmp_path / "decoder_tokenizer"
    word_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def encoder_folder(tmp_path: Any) -> str:
    """A folder with an encoder's tokenizer."""
    folder = tmp_path / "encoder_tokenizer"
    word_tokenizer(encoder=True).save_pretrained(folder)
    return str(folder)
