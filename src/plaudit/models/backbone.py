"""Backbones: any Hugging Face causal language model (without its vocabulary head) or encoder, and its tokenizer."""

import difflib
import inspect
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_MAPPING,
)

from plaudit.configs.model import RewardModelConfig
from plaudit.models.quiet import quiet_loading
from plaudit.models.states import unwrap

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_DROPOUT = re.compile(r"drop(out)?|pdrop")
_PAD_TOKENS = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<|endofpadding|>")


def is_causal(config: Any) -> bool:
    """Whether a transformers configuration is a decoder's (True) or an encoder's (False).

    Args:
        config: the configuration of a base model.

    Raises:
        ValueError: for encoder-decoders and architectures that are neither.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{config.model_type!r} is an encoder-decoder; use a causal language model or an encoder")
    if getattr(config, "use_bidirectional_attention", None) is True or getattr(config, "is_causal", True) is False:
        return False
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES or config.model_type == "bert-generation":
        return bool(getattr(config, "is_decoder", False))
    names = {config.model_type, config.get_text_config().model_type}
    if names & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) or "ForCausalLM" in "".join(config.architectures or ()):
        return True
    raise ValueError(f"{config.model_type!r} is neither a known causal language model nor a known encoder")


def set_dropout(config: Any, probability: float) -> None:
    """Set every dropout probability of a transformers configuration, whatever it is called; layer dropping to 0."""
    for key, value in config.to_dict().items():
        if _DROPOUT.search(key) and isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(config, key, 0.0 if "layer" in key else probability)


def _build_arguments(config: Any) -> dict[str, Any]:
    # A pooler on top of the states is never read: without it no weight stays untrained.
    model_class: Any = MODEL_MAPPING.get(type(config), None)
    takes = model_class is not None and "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if takes else {}


def load_backbone(
    name: str | Path,
    *,
    dtype: str = "float32",
    dropout: float = 0.0,
    trust_remote_code: bool = False,
    config: Any = None,
    variant: str | None = None,
    layers: int | None = None,
) -> nn.Module:
    """A pretrained base model: token states, no vocabulary-sized logits.

    Args:
        name: hub name or folder.
        dtype: `float32`, `bfloat16` or `float16`.
        dropout: every dropout probability.
        trust_remote_code: whether code in the folder may run.
        config: a configuration to use instead of the one in the folder.
        variant: the weight files' variant, as transformers names it.
        layers: keep only the first so many layers (and what follows the last one, such as a final norm).

    Returns:
        The model, on the CPU, in training mode.

    Raises:
        ValueError: if weights are missing, so that part of the model would be random, or there are fewer layers.
    """
    config = config or AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    set_dropout(config, dropout)
    if layers is not None:
        _keep_layers(config, layers, name)
    with quiet_loading():
        model, report = AutoModel.from_pretrained(
            name,
            config=config,
            dtype=DTYPES[dtype],
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            variant=variant,
            **_build_arguments(config),
        )
    missing = sorted(str(key) for key in report["missing_keys"])
    if missing:
        raise ValueError(f"{name}: {len(missing)} weights are missing and would be random, e.g. {missing[:3]}")
    model.train()
    return model  # type: ignore[no-any-return]


def _keep_layers(config: Any, layers: int, name: str | Path) -> None:
    text = config.get_text_config()
    if layers > text.num_hidden_layers:
        raise ValueError(f"backbone_layers: {layers} asked for, but {name} has {text.num_hidden_layers}")
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = text.layer_types[:layers]


def random_backbone(
    model_type: str, sizes: dict[str, Any] | None, *, dtype: str = "float32", dropout: float = 0.0, seed: int = 0
) -> nn.Module:
    """A base model of that architecture with random weights.

    Args:
        model_type: the transformers name, e.g. `llama`.
        sizes: keys of its configuration.
        dtype: `float32`, `bfloat16` or `float16`.
        dropout: every dropout probability.
        seed: seed of the weights; the global generator is left as it was.

    Returns:
        The model, on the CPU, in training mode.
    """
    config = random_config(model_type, sizes or {})
    set_dropout(config, dropout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModel.from_config(config, dtype=DTYPES[dtype], **_build_arguments(config))
    model.train()
    return model  # type: ignore[no-any-return]


def random_config(model_type: str, sizes: dict[str, Any]) -> Any:
    """The configuration of a model with random weights.

    Args:
        model_type: the transformers name, e.g. `llama`.
        sizes: keys of its configuration.

    Raises:
        ValueError: for an unknown architecture, and for a key that is a misspelling of one it has: transformers would
            take it without a word, and build a model of its default size. Other keys pass: some architectures read
            keys that their configuration does not list.
    """
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, list(CONFIG_MAPPING.keys()), n=1)
        raise ValueError(f"model_type: {model_type!r} is unknown" + (f"; did you mean {near[0]!r}?" if near else ""))
    known = AutoConfig.for_model(model_type)
    for key in sizes:
        near = difflib.get_close_matches(key, [*known.to_dict(), *known.attribute_map], n=1, cutoff=0.85)
        if near and not hasattr(known, key):
            raise ValueError(f"backbone_config: {model_type!r} has no key {key!r}; did you mean {near[0]!r}?")
    try:
        return AutoConfig.for_model(model_type, **sizes)
    except StrictDataclassError as error:
        reason = str(error.__cause__ or error).splitlines()[-1].strip()
        raise ValueError(f"backbone_config: {reason}") from error


def backbone_from_config(config: RewardModelConfig, tokenizer: Any) -> nn.Module:
    """The backbone that a reward model's configuration asks for, with room for every id of the tokenizer."""
    if config.backbone is not None:
        model = load_backbone(
            config.backbone,
            dtype=config.dtype,
            dropout=config.dropout,
            trust_remote_code=config.trust_remote_code,
            layers=config.backbone_layers,
        )
    else:
        sizes = {"vocab_size": len(tokenizer), **(config.backbone_config or {})}
        assert config.model_type is not None  # the configuration's own check
        model = random_backbone(config.model_type, sizes, dtype=config.dtype, dropout=config.dropout, seed=config.seed)
    fit_tokenizer(model, tokenizer)
    if config.frozen_layers is not None:
        freeze_first_layers(model, config.frozen_layers)
    return model


def freeze_first_layers(model: nn.Module, count: int) -> None:
    """Stop the embeddings and the first `count` layers from being trained; gradients end above them.

    Args:
        model: a transformers base model; changed in place.
        count: 0 freezes the embeddings alone.

    Raises:
        ValueError: if there are fewer layers, or they are not a list of modules.
    """
    depth = int(unwrap(model).config.get_text_config().num_hidden_layers)  # type: ignore[operator, union-attr]
    if count > depth:
        raise ValueError(f"frozen_layers: {count} asked for, but there are {depth} layers")
    stacks = [each for each in model.modules() if isinstance(each, nn.ModuleList) and len(each) == depth]
    if not stacks:
        raise ValueError(f"frozen_layers: the layers of {type(unwrap(model)).__name__} are not found")
    above = {id(parameter) for parameter in stacks[0].parameters()}
    embeddings = (each for each in model.modules() if isinstance(each, nn.Embedding))
    frozen = {id(parameter) for part in (*stacks[0][:count], *embeddings) for parameter in part.parameters()}
    for name, parameter in model.named_parameters():
        # What belongs to embeddings without being one, such as their norm, is known by its name.
        if id(parameter) in frozen or (id(parameter) not in above and "embed" in name):
            parameter.requires_grad_(False)


TOKENIZER_CHECK = "why is it so good? The cat sat on the mat, 3 times.\nNo. \u5929\u6c14 caf\u00e9"


def load_tokenizer(name: str | Path, *, trust_remote_code: bool = False, check: Sequence[int] | None = None) -> Any:
    """The tokenizer in that folder or of that name, with a pad token that is not its end token.

    Args:
        name: folder or hub name.
        trust_remote_code: whether code in the folder may run.
        check: the ids that it has to give for `TOKENIZER_CHECK`. For a few architectures (Qwen 2) `AutoTokenizer`
            puts the architecture's own class over what the folder says, and a tokenizer of another kind then loses
            its text in silence; where the ids differ, the folder's `tokenizer.json` is taken as it stands.

    Returns:
        The tokenizer.

    Raises:
        ValueError: if no reading of the folder gives the ids of `check`.
    """
    require_folder_or_hub_name(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise not_found(name, error) from error
    except ValueError as error:
        raise ValueError(f"{name}: {' '.join(str(error).split())[:200]}") from error
    if check is not None and check_ids(tokenizer) != list(check):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(name)
        if check_ids(tokenizer) != list(check):
            raise ValueError(f"{name}: the tokenizer gives other ids than when the model was saved")
    ensure_pad_token(tokenizer)
    return tokenizer


def require_folder_or_hub_name(name: str | Path) -> None:
    """Find a mistyped folder before anything is asked of the network.

    Raises:
        ValueError: if `name` is no folder and looks like one: several parts, or the first of them is a folder here; or
            if it is the folder of a run that holds the model one level below.
    """
    text, path = str(name), Path(name)
    if path.is_dir():
        inside = path / "model"
        if not (path / "config.json").is_file() and (inside / "config.json").is_file():
            raise ValueError(f"{name}: this is the folder of a run, not of a model; did you mean {inside}?")
        return
    parts = path.parts
    if path.is_absolute() or text.startswith((".", "~")) or len(parts) != text.count("/") + 1 or len(parts) > 2:
        raise ValueError(f"{name}: no such folder")
    if len(parts) == 2 and Path(parts[0]).is_dir():
        raise ValueError(f"{name}: no such folder (there is a folder {parts[0]}, but not this one in it)")


def not_found(name: str | Path, error: Exception) -> ValueError:
    """The error for a name that is no folder here and could not be fetched, in one line."""
    if Path(name).is_dir():
        return ValueError(f"{name}: {' '.join(str(error).split())[:200]}")
    return ValueError(
        f"{name}: no such folder here, and no model of that name could be fetched ({type(error).__name__}); give the "
        "path of a folder, or a hub name that is in the cache or can be reached"
    )


def check_ids(tokenizer: Any) -> list[int]:
    """The ids of `TOKENIZER_CHECK`."""
    return list(tokenizer(TOKENIZER_CHECK)["input_ids"])


def ensure_pad_token(tokenizer: Any) -> None:
    """Give the tokenizer a pad token that no text ends with.

    Other tools read the score at the rightmost token that is not padding: with pad = eos they would skip the end token.
    A token that is named like padding is taken where the vocabulary has one, otherwise `<|pad|>` is added.

    Args:
        tokenizer: a transformers tokenizer; changed in place.
    """
    pad = tokenizer.pad_token
    if pad is not None and pad not in (tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token):
        return
    vocabulary = tokenizer.get_vocab()
    known = next((token for token in _PAD_TOKENS if token in vocabulary), None)
    # add_special_tokens alone would also mark a known token as special, which is wanted.
    tokenizer.add_special_tokens({"pad_token": known or "<|pad|>"})


def fit_tokenizer(model: nn.Module, tokenizer: Any) -> None:
    """Make room for every id of the tokenizer and write its pad id into a decoder's configuration.

    Args:
        model: a base model; its embedding grows where the tokenizer has more ids (`grow_embeddings`).
        tokenizer: the tokenizer.
    """
    plain: Any = unwrap(model)
    grow_embeddings(plain, len(tokenizer))
    # Decoder classification heads look for the pad id; RoBERTa and its kin would count positions from another one.
    if is_causal(plain.config):
        plain.config.get_text_config().pad_token_id = tokenizer.pad_token_id


@torch.no_grad()
def grow_embeddings(model: nn.Module, rows: int) -> None:
    """Give the input and output embeddings at least `rows` rows; new ones are the mean of those that were there.

    Exactly the mean, without noise: the same backbone grown twice is the same, whatever random numbers were drawn.

    Args:
        model: a transformers model, changed in place.
        rows: token ids to make room for.
    """
    plain: Any = unwrap(model)
    before = plain.get_input_embeddings().weight.shape[0]
    if rows <= before:
        return
    plain.resize_token_embeddings(rows, mean_resizing=False)
    for module in (plain.get_input_embeddings(), plain.get_output_embeddings()):
        for weight in () if module is None else module.parameters(recurse=False):
            # In float64, so that the order of the sum does not show, and in pieces, so that it takes no memory.
            total = torch.stack([piece.double().sum(0) for piece in weight[:before].split(4096)]).sum(0)
            weight[before:] = (total / before).to(weight.dtype)


def longest_text(config: Any, tokenizer: Any) -> int:
    """The most tokens that the backbone and its tokenizer allow; 1,000,000 where neither sets a limit."""
    limits = [1_000_000]
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    if isinstance(positions, int) and positions > 0:
        # RoBERTa and its kin count positions from padding_idx + 1.
        limits.append(positions - 2 if config.model_type in ("roberta", "xlm-roberta", "camembert") else positions)
    if tokenizer is not None and 0 < tokenizer.model_max_length < 1_000_000:
        limits.append(int(tokenizer.model_max_length))
    return min(limits)
