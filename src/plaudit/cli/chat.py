"""`plaudit chat`: talk to a language model by hand."""

import io
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plaudit.models.causal_lm import CausalLM


def chat(
    model: str,
    *,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> None:
    """Talk to a language model: one line is one turn; an empty line starts anew, the end of input leaves.

    Parameters
    ----------
    model
        Folder (or Hugging Face name) of a causal language model.
    system
        What the model is told before the conversation.
    max_new_tokens
        Most tokens of an answer.
    temperature
        Logits are divided by it.
    top_p
        Draw from the fewest tokens whose probability reaches `p`.
    seed
        Seed of the first answer; each further one uses the next.
    device
        `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
    dtype
        Number type of the weights: float32, bfloat16 or float16.
    trust_remote_code
        Let code in the model's folder run.
    """
    from plaudit.cli.verb import config_of_options
    from plaudit.configs.generation import SamplingConfig

    sampling = config_of_options(
        SamplingConfig, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    from plaudit.data.records import Message
    from plaudit.rollout.answering import reply

    loaded = open_language_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    start = [] if system is None else [Message("system", system)]
    messages = list(start)
    interactive = sys.stdin.isatty()

    def say(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    while True:
        if interactive:
            say("> ")
        line = sys.stdin.readline()
        if not line:
            break
        if not line.strip():
            messages = list(start)
            continue
        messages.append(Message("user", line.strip()))
        messages.append(Message("assistant", reply(loaded, messages, sampling, say)))
        sampling = sampling.model_copy(update={"seed": sampling.seed + 1})
        say("\n")


def open_language_model(name: str, *, device: str, dtype: str, trust_remote_code: bool) -> "CausalLM":
    """A causal language model on its device, in evaluation mode.

    Raises:
        ValueError: if it is none, or the device or number type is not there.
    """
    from plaudit.models.backbone import DTYPES
    from plaudit.models.causal_lm import CausalLM
    from plaudit.training.precision import pick_device

    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: use one of {', '.join(DTYPES)}")
    loaded = CausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code)
    return loaded.to(pick_device(device)).eval()
