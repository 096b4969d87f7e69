"""Causal language models over packed batches: states and vocabulary head apart, so that no table of logits is made."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from plaudit.configs.sft import LanguageModelConfig
from plaudit.core.layout import PackedBatch
from plaudit.core.logprobs import token_logprobs
from plaudit.data.tokenising import TextTokeniser
from plaudit.models.aggregation import TokenSpans, token_spans
from plaudit.models.backbone import (
    DTYPES,
    grow_embeddings,
    is_causal,
    load_tokenizer,
    longest_text,
    random_config,
    set_dropout,
)
from plaudit.models.checkpointing import disable_checkpointing, enable_checkpointing
from plaudit.models.goals import GoalHeads
from plaudit.models.probe import choose_path, probe_batch
from plaudit.models.quiet import quiet_loading
from plaudit.models.states import packed_states, padded_states, unwrap
from plaudit.models.steering import save_steering, steering_beside
from plaudit.models.styles import StyleHeads


class CausalLM(nn.Module):
    """A transformers causal language model that reads packed batches.

    Attributes:
        model: the transformers model, possibly with adapters; its `generate` and plain forward work as ever.
        tokenizer: its tokenizer, with a pad token that is not its end token.
        packed: whether forwards are packed; otherwise padded rows with the same numbers.
        max_length: most tokens of a text.
        backbone_name: where the weights came from; None for random weights.
        steering: what bends its words between states and vocabulary head, or None. Whatever samples from the model
            or evaluates it as a policy does so with it; the transformers model inside knows nothing of it.
    """

    steering: StyleHeads | GoalHeads | None

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        attn_implementation: str = "auto",
        max_length: int | None = None,
        backbone_name: str | None = None,
    ) -> None:
        """Wrap a model and decide how it is run.

        Args:
            model: a transformers causal language model.
            tokenizer: its tokenizer.
            attn_implementation: `auto`, `packed` or `padded`.
            max_length: most tokens of a text; None takes what model and tokenizer allow.
            backbone_name: where the weights came from.

        Raises:
            ValueError: if it is not a causal language model, its logits are not those of its states and its
                vocabulary head, or packing was asked for and is not possible.
        """
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.backbone_name = backbone_name
        self.steering = None
        plain: Any = unwrap(model)
        if not is_causal(plain.config):
            raise ValueError(f"{type(plain).__name__} is an encoder; a causal language model is needed")
        grow_embeddings(plain, len(tokenizer))
        plain.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        if getattr(plain, "generation_config", None) is not None:
            plain.generation_config.pad_token_id = tokenizer.pad_token_id
        self.max_length = max_length or longest_text(plain.config, tokenizer)
        self.packed = choose_path(self.base, causal=True, wanted=attn_implementation)
        self._check_head()

    @classmethod
    def from_backbone(cls, config: LanguageModelConfig) -> "CausalLM":
        """A language model from a name, a folder, or a configuration of random weights; on the CPU, training mode."""
        tokenizer = load_tokenizer(
            config.tokenizer or config.backbone or "", trust_remote_code=config.trust_remote_code
        )
        with quiet_loading():
            if config.backbone is not None:
                model = _load(config.backbone, config.dtype, config.dropout, config.trust_remote_code)
            else:
                sizes = {"vocab_size": len(tokenizer), **(config.backbone_config or {})}
                # Generation stops at the tokenizer's end token, not at the architecture's default id.
                sizes = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, **sizes}
                assert config.model_type is not None  # the configuration's own check
                settings = random_config(config.model_type, sizes)
                set_dropout(settings, config.dropout)
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(config.seed)
                    model = AutoModelForCausalLM.from_config(settings, dtype=DTYPES[config.dtype])
        result = cls(
            model,
            tokenizer,
            attn_implementation=config.attn_implementation,
            max_length=config.max_length,
            backbone_name=config.backbone,
        )
        if config.lora is not None:
            from plaudit.models.lora import wrap_lora

            result.model = wrap_lora(result.model, config.lora, seed=config.seed)
        return result.train()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: str = "float32",
        attn_implementation: str = "auto",
        max_length: int | None = None,
        trust_remote_code: bool = False,
    ) -> "CausalLM":
        """Open a folder or hub name, with what steers it where a folder has that; on the CPU, in evaluation mode."""
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        with quiet_loading():
            model = _load(name, dtype, 0.0, trust_remote_code)
        found = cls(
            model, tokenizer, attn_implementation=attn_implementation, max_length=max_length, backbone_name=str(name)
        )
        found.steering = steering_beside(name)
        return found.eval()

    @property
    def base(self) -> nn.Module:
        """The model without its vocabulary head; adapters live inside its layers."""
        plain: Any = unwrap(self.model)
        base: nn.Module = plain.base_model
        return base

    def text_tokeniser(self, **options: Any) -> TextTokeniser:
        """A tokeniser for this model; `options` as for `plaudit.data.tokenising.TextTokeniser`."""
        return TextTokeniser(self.tokenizer, **{"causal": True, "max_length": self.max_length, **options})

    @property
    def end_token_ids(self) -> list[int]:
        """Every id that ends an answer, each once.

        First the one that the tokeniser puts behind answers, then the tokenizer's own end of text and those of the
        model's `generation_config`, of which it may name several (Llama 3: `<|eot_id|>`, `<|eom_id|>`,
        `<|end_of_text|>`). They are read anew at every call, and saved with the model. Ids that the vocabulary does not
        have are left out: defaults of an architecture, which no answer can hold.
        """
        model: Any = unwrap(self.model)
        found = [self.text_tokeniser().end_token_id, self.tokenizer.eos_token_id]
        found += configured_ends(getattr(model, "generation_config", None))
        vocabulary = self.head[0].shape[0]
        return [end for end in dict.fromkeys(found) if end is not None and 0 <= end < vocabulary]

    def forward(self, batch: PackedBatch) -> Tensor:
        """States that the vocabulary head reads, scaled as the architecture scales its logits: `[N, H]`."""
        path = packed_states if self.packed else padded_states
        return path(self.base, batch) * self.logit_scale

    @property
    def head(self) -> tuple[Tensor, Tensor | None, float | None]:
        """`(weight [V, H], bias [V] or None, soft-cap or None)`: `logits = cap · tanh((h Wᵀ + b) / cap)`."""
        plain: Any = unwrap(self.model)
        layer = plain.get_output_embeddings()
        softcap = getattr(plain.config.get_text_config(), "final_logit_softcapping", None)
        return layer.weight, getattr(layer, "bias", None), softcap

    @property
    def logit_scale(self) -> float:
        """The factor on the logits: Cohere's `logit_scale`, one over Granite's `logits_scaling`, else 1."""
        config: Any = unwrap(self.model).config.get_text_config()  # type: ignore[operator, union-attr]
        if isinstance(divisor := getattr(config, "logits_scaling", None), (int, float)):
            return 1.0 / divisor
        return float(getattr(config, "logit_scale", None) or 1.0)

    def completion_logprobs(self, batch: PackedBatch) -> tuple[Tensor, TokenSpans]:
        """Log-probability of every completion token that something predicts.

        The first token of a completion is predicted by the prompt's last one; with an empty prompt by nothing, and
        its entry is 0.

        Args:
            batch: `N` tokens, `C` completions.

        Returns:
            `[M]` float32 and the spans that say which completion and step each entry is.
        """
        spans = token_spans(batch.layout)
        predictors = batch.layout.predictor_index[spans.places]
        predicted = predictors >= 0
        weight, bias, softcap = self.head
        states = self(batch)[predictors[predicted]]
        found = token_logprobs(states, weight, batch.input_ids[spans.places[predicted]], bias=bias, softcap=softcap)
        result = torch.zeros(spans.places.shape[0], dtype=found.dtype, device=found.device)
        return result.masked_scatter(predicted, found), spans

    def gradient_checkpointing_enable(self, *, use_reentrant: bool = False) -> None:
        """Recompute activations in the backward pass instead of keeping them; the gradients are the same."""
        enable_checkpointing(self.model, use_reentrant=use_reentrant)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        disable_checkpointing(self.model)

    def save_pretrained(self, folder: str | Path) -> None:
        """Save model and tokenizer as a plain transformers folder; adapters are merged into the saved weights.

        What steers the model lies beside it, in files that transformers does not read.
        """
        folder = Path(folder)
        model: Any = self.model
        if unwrap(model) is not model:
            import copy

            model = copy.deepcopy(model).merge_and_unload()
        for path in folder.glob("model*.safetensors*"):
            path.unlink() if path.is_file() else shutil.rmtree(path)
        with quiet_loading():
            model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        save_steering(self.steering, folder)

    @torch.no_grad()
    def _check_head(self) -> None:
        parameter = next(self.model.parameters())
        if parameter.device.type == "meta":
            return
        plain: Any = unwrap(self.model)
        training = plain.training
        plain.eval()
        batch = probe_batch(True, [(3, [4])], min(100, plain.get_input_embeddings().weight.shape[0]))
        batch = batch.to(parameter.device)
        wanted = plain(input_ids=batch.input_ids[None]).logits[0].float()
        weight, bias, softcap = self.head
        logits = (self(batch) @ weight.T).float()
        logits = logits if bias is None else logits + bias.float()
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        plain.train(training)
        difference = (logits - wanted).abs().max().item()
        tolerance = 1e-4 if parameter.dtype == torch.float32 else 0.1
        if not difference <= tolerance * max(1.0, wanted.abs().max().item()):
            raise ValueError(
                f"{type(plain).__name__} computes its logits in a way that is not known here (off by {difference:.2g})"
            )


def configured_ends(generation_config: Any) -> list[int]:
    """The end tokens of a transformers `GenerationConfig`: none, one or several; none without a configuration."""
    ends = getattr(generation_config, "eos_token_id", None)
    return [] if ends is None else [ends] if isinstance(ends, int) else [int(end) for end in ends]


def _load(name: str | Path, dtype: str, dropout: float, trust_remote_code: bool) -> nn.Module:
    if (Path(name) / "adapter_config.json").is_file() and not (Path(name) / "config.json").is_file():
        raise ValueError(
            f"{name}: adapters alone, not a whole model; merge them first: AutoPeftModelForCausalLM.from_pretrained("
            f"{str(name)!r}).merge_and_unload().save_pretrained(FOLDER), with the tokenizer beside it"
        )
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    if any(kind.endswith("ForSequenceClassification") for kind in config.architectures or ()):
        raise ValueError(
            f"{name}: a reward model (or another classifier), not a language model: its words were not trained; give "
            "the folder of the language model that it was made from"
        )
    set_dropout(config, dropout)
    model, report = AutoModelForCausalLM.from_pretrained(
        name, config=config, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code, output_loading_info=True
    )
    missing = sorted(str(key) for key in report["missing_keys"])
    if missing:
        raise ValueError(f"{name}: {len(missing)} weights are missing and would be random, e.g. {missing[:3]}")
    return model  # type: ignore[no-any-return]
