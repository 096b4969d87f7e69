"""Generation for training by vLLM in this process. Written against vLLM's interface; not run against vLLM itself.

What its tests hold is the translation: requests, end tokens, log-probabilities, weights, on a stand-in for the package.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from plaudit.configs.generation import SamplingConfig
from plaudit.models.causal_lm import configured_ends
from plaudit.rollout.generate import GenerationResult, as_result


class VllmEngine:
    """A `plaudit.rollout.engine.Engine` whose answers come from a vLLM that holds a copy of the policy (needs `vllm`).

    vLLM's numbers are not those of the training forward: `algorithm.importance_cap` weighs by their ratio.

    Attributes:
        tokenizer: decodes the answers; the policy's.
        end_token_ids: what ends an answer where a call names nothing else: the tokenizer's end of text and those of the
            folder's `generation_config.json`. `plaudit align` hands its policy's to every call.
    """

    def __init__(self, folder: str | Path, tokenizer: Any, **options: Any) -> None:
        """Start vLLM.

        Args:
            folder: a saved transformers model of the policy's architecture and tokens.
            tokenizer: the policy's tokenizer.
            options: of `vllm.LLM`, such as `gpu_memory_utilization`, `tensor_parallel_size`, `dtype`.

        Raises:
            ValueError: if vLLM is not installed.
        """
        # Its engine in this process: otherwise its weights are out of reach.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            import vllm
        except ImportError as error:
            raise ValueError("VllmEngine needs vLLM, which Plaudit does not install: pip install vllm") from error
        self.tokenizer = tokenizer
        self.end_token_ids = _ends(folder, tokenizer)
        self._parameters: Any = vllm.SamplingParams
        # `processed`: at the sampling temperature.
        self._llm: Any = vllm.LLM(model=str(folder), logprobs_mode="processed_logprobs", **options)

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Hand over new weights by their names in the transformers model, and drop what was cached with old ones."""
        worker = self._llm.llm_engine.model_executor.driver_worker
        worker.model_runner.model.load_weights([(name, tensor.detach()) for name, tensor in weights])
        self._llm.reset_prefix_cache()

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        *,
        samples_per_prompt: int = 1,
        sampling: SamplingConfig | None = None,
        end_token_ids: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> GenerationResult:
        """Answer prompts given as token ids; see `plaudit.rollout.generate.generate`.

        Raises:
            ValueError: for another method than `sample`, and for top-k, top-p and min-p: the log-probabilities under
                the whole distribution are not to be had then.
        """
        sampling = sampling or SamplingConfig()
        if sampling.method != "sample" or any((sampling.top_k, sampling.top_p, sampling.min_p)):
            raise ValueError(
                "vLLM as an engine draws from the whole distribution: method sample, no top_k, top_p, min_p"
            )
        ends = self.end_token_ids if end_token_ids is None else list(end_token_ids)
        seed = sampling.seed if generator is None else int(torch.randint(2**31, (), generator=generator))
        prompts = [list(prompt) for prompt in prompt_ids]
        # A seed for each prompt: the same one would give equal prompts equal answers.
        parameters = [
            self._parameters(
                n=samples_per_prompt,
                temperature=sampling.temperature,
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=ends,
                ignore_eos=True,
                stop=list(sampling.stop_strings) or None,
                include_stop_str_in_output=True,
                seed=(seed + place) % 2**31,
                logprobs=0,
            )
            for place in range(len(prompts))
        ]
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self._llm.generate(requests, sampling_params=parameters, use_tqdm=False)
        answers = {
            place: [_answer(each) for each in sorted(output.outputs, key=lambda each: each.index)]
            for place, output in enumerate(outputs)
        }
        return as_result(prompts, answers, self.tokenizer, sampling, ends)


def _ends(folder: str | Path, tokenizer: Any) -> list[int]:
    """The tokenizer's end token and the configured ones of a saved model, each once."""
    described = (Path(folder) / "generation_config.json").is_file()
    config = GenerationConfig.from_pretrained(folder) if described else None
    found = dict.fromkeys([tokenizer.eos_token_id, *configured_ends(config)])
    return [end for end in found if end is not None]


def _answer(output: Any) -> tuple[list[int], list[float], list[float], bool, None]:
    """One of vLLM's completions: ids with the end token, log-probabilities twice, whether it came to an end."""
    ids = list(output.token_ids)
    logprobs = [float(step[token].logprob) for token, step in zip(ids, output.logprobs, strict=True)]
    return ids, logprobs, logprobs, output.finish_reason == "stop", None
