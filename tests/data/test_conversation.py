"""What the chat template and the tokenizer make of a conversation: prompts, ends of turns, tools, reasoning."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from data.chat_templates import (
    ALTERNATING,
    ALWAYS_PROMPTING,
    CALLS_AS_PYTHON,
    CALLS_AS_TEXT,
    CHATML,
    OPEN,
    OWN_SYSTEM,
    REWRITING,
    THINKING,
    TRIMMING,
    tokenizer_for,
)
from qat_edge.data import tokenization
from qat_edge.data.conversation import AnswerReader, ChatFormat, end_ids, template_faults, text_prompt
from qat_edge.data.formats import Chat, Completion, Row, Text, load_rows
from qat_edge.data.rows import Message
from qat_edge.data.token_table import IGNORED
from qat_edge.errors import DataError, ModelError
from qat_edge.evaluate.metrics import outputs_match

QUESTION: Message = {"role": "user", "content": "Where?"}
ANSWER: Message = {"role": "assistant", "content": "Oslo"}
DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "the first thing "},
    {"role": "assistant", "content": "the answer"},
    {"role": "user", "content": "another"},
    {"role": "assistant", "content": "\nand on"},
]
TOOL = {"type": "function", "function": {"name": "rain", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "rain", "arguments": {"city": "Oslo", "days": 2}}}
CALLING: list[Message] = [
    QUESTION,
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"rain": true}'},
    {"role": "assistant", "content": "Yes."},
]


def trained_texts(chat: Chat, tokenizer: Any) -> list[str]:
    """Return the texts with loss of a conversation, one for each turn."""
    return [tokenizer.decode(turn.ids[: turn.trained]) for turn in ChatFormat(tokenizer).turns(chat)]


def notes(chat: Chat, tokenizer: Any) -> str:
    return "\n".join(tokenization.tokenize([chat], tokenizer, 512).notes)


# --- plain rows are what they were -------------------------------------------------------------------------

GOLDEN_ROWS: list[Row] = [
    Chat(DIALOGUE, "1"),
    Chat(DIALOGUE[1:3], "2"),
    Completion("in the ", "then", "3"),
    Completion("t", "he", "4"),
    Text("abcdefghij" * 3, "5"),
    Text("then", "6"),
    Chat([*DIALOGUE, {"role": "user", "content": "and?"}], "7"),
]


@pytest.mark.parametrize(
    ("template", "adds_bos", "expected"),
    [
        (CHATML, False, "e4a568a72f15b3c0d36e148a751e8cf9569ce37b8215e7a6a4657605ec24929c"),
        (CHATML, True, "b9bc7b2e654033ee167887deec2759473a948f84a6d712a6768e8bcf87692732"),
        (OWN_SYSTEM, False, "0fb3c03504903f2e9015306d08330227df0696abc0b07d3fb052e66f92b73a8d"),
        (OWN_SYSTEM, True, "f1ede65812c0bfcf8a06a2e0680c8321a1005f9bb19f0d21e1a6c92dce6f0b69"),
        (TRIMMING, False, "c999fc272b9563431cd1dcab9cc86a6db319dc977f6a88397872fd3fe3a68e9b"),
        (TRIMMING, True, "ff55878a11d5ef46a6cb7daede73b7978a39bfa9d0096cac8e871e784ca57ca9"),
        (REWRITING, False, "e48be3d68fa13eef5aa6451bf264eaf8d5de32299aede34e95270e707fa6026c"),
        (REWRITING, True, "95691341a82f6de334e91aabfda6d799f2490fa0333b2e6640bfd0fcc0d6fece"),
    ],
)
def test_token_ids_and_labels_of_plain_rows_are_those_of_version_0_2(
    template: str, adds_bos: bool, expected: str
) -> None:
    tokenizer = tokenizer_for(template, adds_bos=adds_bos)
    rows = list(tokenization.tokenize(GOLDEN_ROWS, tokenizer, 400).rows)
    prompts = [[prompt.ids, prompt.expected] for prompt in tokenization.prompts(GOLDEN_ROWS, tokenizer)]
    assert hashlib.sha256(json.dumps([rows, prompts]).encode()).hexdigest() == expected


@pytest.mark.parametrize("template", [CHATML, OWN_SYSTEM, TRIMMING, REWRITING, THINKING, OPEN, ALTERNATING])
def test_the_prompt_of_generation_is_what_precedes_a_trained_answer(template: str) -> None:
    tokenizer = tokenizer_for(template)
    (turn,) = ChatFormat(tokenizer).turns(Chat([QUESTION, ANSWER], "row"))
    (row,) = tokenization.tokenize([Chat([QUESTION, ANSWER], "row")], tokenizer, 512).rows
    ((validated, *_),) = tokenization.prompts([Chat([QUESTION, ANSWER], "row")], tokenizer)
    generated = ChatFormat(tokenizer).prompt([QUESTION]).ids
    assert generated == validated == turn.prompt_ids == row["input_ids"][: len(generated)]
    assert row["labels"][: len(generated)] == [IGNORED] * len(generated)
    assert row["labels"][len(generated)] != IGNORED


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_text_that_brings_its_own_begin_and_end_gets_no_second_one(adds_bos: bool) -> None:
    tokenizer = tokenizer_for(None, adds_bos=adds_bos)
    first = tokenizer.bos_token if adds_bos else ""
    last = tokenizer.eos_token
    plain: list[Row] = [Completion("in the ", "then", "row"), Text("one", "row"), Text("two", "row")]
    framed: list[Row] = [
        Completion(f"{first}in the ", f"then{last}\n", "row"), Text(f"{first}one{last}", "row"),
        Text(f"{first}two{last}\n", "row"),
    ]  # fmt: skip
    ours, theirs = (tokenization.tokenize(rows, tokenizer, 64) for rows in (plain, framed))
    assert list(theirs.rows) == list(ours.rows)
    assert not ours.notes and "3 rows spell the token that the tokenizer begins or ends a text with" in theirs.notes[0]
    assert text_prompt(f"{first}in the ", tokenizer).ids == text_prompt("in the ", tokenizer).ids
    assert text_prompt(f"{first}in the ", tokenizer).text == text_prompt("in the ", tokenizer).text


def test_a_text_with_an_end_token_inside_still_ends() -> None:
    tokenizer = tokenizer_for(None)
    (row,) = tokenization.tokenize([Completion("a ", f"b{tokenizer.eos_token} c", "row")], tokenizer, 64).rows
    end = tokenizer.eos_token_id
    assert row["input_ids"].count(end) == 2 and row["input_ids"][-1] == end


@pytest.mark.parametrize(
    "row",
    [
        Completion("a ", "<|python_tag|>{}<|im_end|>", "row"),
        Chat([QUESTION, {"role": "assistant", "content": "<|python_tag|>{}"}], "row"),
    ],
)
def test_an_answer_with_special_tokens_equals_its_own_row(row: Row) -> None:
    tokenizer = tokenizer_for(CHATML)
    tokenizer.add_tokens(["<|python_tag|>"], special_tokens=True)
    (trained,) = tokenization.tokenize([row], tokenizer, 512).rows
    answer = [label for label in trained["labels"] if label != IGNORED]
    ((_, expected, *_),) = tokenization.prompts([row], tokenizer)
    reader = AnswerReader(tokenizer)
    assert outputs_match(reader.from_ids(answer), reader.from_text(expected))
    # Native runners may write the tokens as text.
    assert reader.from_text(tokenizer.decode(answer)) == "{}"
    assert not outputs_match(reader.from_ids(tokenizer.encode("[]")), reader.from_text(expected))


def test_several_tokens_before_a_text_are_trained_and_an_end_token_after_it_is_none_of_them() -> None:
    tokenizer = tokenizer_for(None, added=("[m]", "[s]"))
    ids = tokenizer.convert_tokens_to_ids(["[m]", "[s]"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[m] [s] $A", special_tokens=list(zip(["[m]", "[s]"], ids, strict=True))
    )
    (row,) = tokenization.tokenize([Completion("in the ", "then", "row")], tokenizer, 64).rows
    assert row["input_ids"][: len(ids)] == ids == tokenizer("in the ").input_ids[: len(ids)]
    prompt = text_prompt("in the ", tokenizer)
    assert prompt.text == "[m][s]in the " and tokenizer.encode(prompt.text, add_special_tokens=False) == prompt.ids

    tokenizer = tokenizer_for(None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|im_start|>", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    assert text_prompt("a", tokenizer).ids == tokenizer.encode("a", add_special_tokens=False)


def test_no_space_comes_between_a_prompt_and_its_completion() -> None:
    """Tokenizers such as Llama 2's put a space before every text."""
    words = ["<unk>", "<s>", "</s>", "▁", "A", ":", ":4", "4", "\n"]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [(":", "4")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    (row,) = tokenization.tokenize([Completion("A:", "4", "row")], tokenizer, 64).rows
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == ["▁", "A", ":", "4", "</s>"]


def test_tokens_for_text_that_the_tokenizer_lacks_are_counted() -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "</s>": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    notes = tokenization.tokenize([Completion("a ", "b c d", "row")], tokenizer, 64).notes
    assert any("2 trained tokens are the tokenizer's unknown token" in note for note in notes)
    assert not tokenization.tokenize([Completion("a ", "b", "row")], tokenizer, 64).notes


def test_template_arguments_that_differ_are_named() -> None:
    tokenizer = tokenizer_for("{{ tone | default('calm') }}" + CHATML)
    rows = [Chat([QUESTION, ANSWER], "row", template_arguments={"tone": "loud"}) for _ in range(2)]
    same = tokenization.tokenize(rows, tokenizer, 512)
    assert same.template_arguments == {"tone": "loud"}
    assert not any("differ between rows" in note for note in same.notes)
    other = tokenization.tokenize([*rows, Chat([QUESTION, ANSWER], "row")], tokenizer, 512)
    assert other.template_arguments == {}
    assert any("chat_template_kwargs differ between rows ('tone')" in note for note in other.notes)


def test_a_completion_and_a_raw_prompt_begin_alike() -> None:
    tokenizer = tokenizer_for(None, adds_bos=True)
    (row,) = tokenization.tokenize([Completion("in the ", "then", "row")], tokenizer, 64).rows
    prompt = text_prompt("in the ", tokenizer)
    assert prompt.ids == row["input_ids"][: len(prompt.ids)]
    assert prompt.ids[0] == tokenizer.bos_token_id
    assert tokenizer.encode(prompt.text, add_special_tokens=False) == prompt.ids


# --- the end of a turn -------------------------------------------------------------------------------------


def test_turns_that_the_template_does_not_end_are_trained_to_end_with_the_tokenizers_end_token() -> None:
    tokenizer = tokenizer_for(OPEN)
    chat = Chat([QUESTION, ANSWER, QUESTION, ANSWER], "row")
    first, second = tokenization.tokenize([chat], tokenizer, 512).rows
    assert tokenizer.decode(first["input_ids"]) == "<|user|>Where?<|assistant|>Oslo<|im_end|>"
    # The prompt of the second turn is what the template writes, without the token.
    assert tokenizer.decode(second["input_ids"]) == (
        "<|user|>Where?<|assistant|>Oslo<|user|>Where?<|assistant|>Oslo<|im_end|>"
    )
    for row in (first, second):
        assert row["labels"][-1] == row["input_ids"][-1] == tokenizer.eos_token_id
        assert tokenizer.decode([label for label in row["labels"] if label != IGNORED]) == "Oslo<|im_end|>"
    done = tokenization.tokenize([chat], tokenizer, 512)
    assert done.end_of_turn == (tokenizer.eos_token_id,)
    assert "Answers are trained to end with <|im_end|>" in "\n".join(done.notes)


def test_a_generation_prompt_that_is_always_written_is_no_part_of_an_answer() -> None:
    tokenizer = tokenizer_for(ALWAYS_PROMPTING)
    chat = Chat([QUESTION, ANSWER, QUESTION, ANSWER], "row")
    assert trained_texts(chat, tokenizer) == ["Oslo<|im_end|>"] * 2
    assert "no token at the end" not in notes(chat, tokenizer)
    # The same ids as with a template that writes it on request.
    plain, always = (tokenization.tokenize([chat], tokenizer_for(t), 512).rows for t in (CHATML, ALWAYS_PROMPTING))
    assert [row["labels"] for row in plain] == [row["labels"] for row in always]
    # A text template has no token that ends the turn.
    text = (
        "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n\n' }}{% endfor %}{{ '### assistant:\n' }}"
    )
    (only,) = ChatFormat(tokenizer_for(text)).turns(Chat([QUESTION, ANSWER], "row"))
    assert tokenizer.decode(only.ids) == "Oslo\n\n<|im_end|>"


def test_without_any_end_token_a_note_says_that_answers_do_not_end() -> None:
    tokenizer = tokenizer_for(OPEN)
    tokenizer.eos_token = None
    assert end_ids(tokenizer) == []
    assert trained_texts(Chat([QUESTION, ANSWER], "row"), tokenizer) == ["Oslo"]
    assert "generation will run to its limit. Set eos_token" in notes(Chat([QUESTION, ANSWER], "row"), tokenizer)


def test_an_added_token_that_the_template_writes_after_an_answer_ends_it() -> None:
    tokenizer = tokenizer_for(CHATML.replace("<|im_end|>", "<|stop|>"), added=("<|stop|>", "</tool_call>"))
    stop = tokenizer.convert_tokens_to_ids("<|stop|>")
    done = tokenization.tokenize([Chat([QUESTION, ANSWER], "row")], tokenizer, 512)
    assert done.end_of_turn == (stop,)
    assert not done.notes
    # The same kind of token at the end of the text is no end of the turn.
    open_ended = tokenizer_for(OPEN, added=("</tool_call>",))
    calling = Chat([QUESTION, {"role": "assistant", "content": "call</tool_call>"}], "row")
    assert trained_texts(calling, open_ended) == ["call</tool_call><|im_end|>"]


def test_the_template_of_a_folder_is_compared_with_its_end_tokens() -> None:
    tokenizer = tokenizer_for(CHATML)
    end = tokenizer.eos_token_id
    assert template_faults(tokenizer, [end], [end]) == []
    (fault,) = template_faults(tokenizer, [0], None)
    assert "ends answers with '<|im_end|>' (2), which is not among the end tokens [0]" in fault
    (fault,) = template_faults(tokenizer, [0], [end])
    assert fault.startswith("Training ended answers with '<|im_end|>' (2)")
    assert template_faults(tokenizer, [0], []) == [], "a run without conversations"
    tokenizer.chat_template = "{{ bos_token + bos_token }}" + CHATML.replace("<|im_start|>", "")
    assert any("twice" in fault for fault in template_faults(tokenizer, [end], None))
    tokenizer.chat_template = "{% for %}"
    assert "cannot be used" in template_faults(tokenizer, [end], None)[0]


# --- reasoning ---------------------------------------------------------------------------------------------


def test_an_empty_block_of_reasoning_is_trained_and_no_part_of_the_answer() -> None:
    tokenizer = tokenizer_for(THINKING, added=("<think>", "</think>"))
    chat = Chat([QUESTION, ANSWER], "row")
    assert trained_texts(chat, tokenizer) == ["<think>\n\n</think>\n\nOslo<|im_end|>"]
    ((prompt, expected, *_),) = tokenization.prompts([chat], tokenizer)
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")
    reader = AnswerReader(tokenizer)
    (turn,) = ChatFormat(tokenizer).turns(chat)
    for output in (turn.ids, turn.ids[: turn.trained - 1], tokenizer.encode("Oslo")):
        assert outputs_match(reader.from_ids(output), reader.from_text(expected))
    assert not outputs_match(reader.from_ids(tokenizer.encode("<think>\n\n</think>\n\nRome")), expected)


def test_reasoning_is_trained_and_the_answer_after_it_is_compared() -> None:
    tokenizer = tokenizer_for(THINKING)
    chat = Chat([QUESTION, {**ANSWER, "reasoning_content": "Up north."}], "row")
    assert trained_texts(chat, tokenizer) == ["<think>\nUp north.\n</think>\n\nOslo<|im_end|>"]
    reader = AnswerReader(tokenizer)
    assert reader.from_ids(tokenizer.encode("<think>\nOr so.\n</think>\n\nOslo")).strip() == "Oslo"
    inline = Chat([QUESTION, {"role": "assistant", "content": "<think>\nUp north.\n</think>\n\nOslo"}], "row")
    ((_, expected, *_),) = tokenization.prompts([inline], tokenizer)
    assert reader.from_text(expected).strip() == "Oslo"


def test_reasoning_in_special_tokens_is_found_in_generated_ids() -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}"
        "{% if m.thinking %}<|endoftext|>why{{ m.thinking }}<|im_end|><|im_start|>assistant{% endif %}"
        "{% if m.role == 'assistant' %}<|endoftext|>final{% endif %}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )
    tokenizer = tokenizer_for(template)
    reader = AnswerReader(tokenizer)
    for message in (ANSWER, {**ANSWER, "thinking": "Up north."}):
        (turn,) = ChatFormat(tokenizer).turns(Chat([QUESTION, message], "row"))
        assert reader.from_ids(turn.ids).strip() == "Oslo"


def test_a_part_of_an_answer_that_the_template_leaves_out_is_refused() -> None:
    content = "{% set c = m.content.split('</think>')[-1] %}"
    template = "{% for m in messages %}" + content + "<|im_start|>{{ m.role }}\n{{ c }}<|im_end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    question = {"role": "user", "content": "a"}
    cut = Chat([question, {"role": "assistant", "content": "<think>\nlong reasoning\n</think>\n\nyes"}], "f:1")
    with pytest.raises(DataError, match=r"f:1: .* leaves out a part of message 2 .*'think', 'long', 'reasoning'\."):
        ChatFormat(tokenizer_for(template)).turns(cut)

    # Trimming, also around reasoning, loses nothing; other changes are counted.
    assert not notes(cut, tokenizer_for(THINKING))
    lower = template.replace("{{ c }}", "{{ m.content | lower }}")
    changed = Chat([question, {"role": "assistant", "content": "Yes SIR"}], "f:1")
    assert "changes the text of 1 message of the assistant" in notes(changed, tokenizer_for(lower))


CONTENT = "message['content']"  # as CHATML writes it
WITHOUT_REPETITIONS = CHATML.replace(
    "{{ '<|im_start|>'",
    "{% set seen = messages[:loop.index0] | selectattr('role', 'equalto', 'user') | map(attribute='content') | list %}"
    "{{ '<|im_start|>'",
).replace(CONTENT, f"('' if {CONTENT} in seen else {CONTENT})")


@pytest.mark.parametrize(
    ("template", "messages", "lost"),
    [
        (CHATML.replace(CONTENT, f"{CONTENT}[:2]"),
         [{"role": "user", "content": "abcdef"}, {**ANSWER, "content": "no"}], "1.*'abcdef'"),
        # The answer has the word as well.
        (CHATML.replace(CONTENT, f"{CONTENT}[:4]"), [{"role": "user", "content": "say Oslo"}, ANSWER], "1.*'Oslo'"),
        (CHATML.replace(CONTENT, f"{CONTENT}.replace('!', '')"), [{"role": "user", "content": "!"}, ANSWER], "1.*'!'"),
        (WITHOUT_REPETITIONS, [QUESTION, ANSWER, QUESTION, {**ANSWER, "content": "Rome"}], "[13].*'Where'"),
        (CHATML.replace(CONTENT, f"{CONTENT}.split('and')[0]"), [{"role": "user", "content": "sun and moon"}, ANSWER],
         "1.*'and', 'moon'"),
    ],
)  # fmt: skip
def test_a_part_of_a_users_text_that_the_template_leaves_out_is_refused(
    template: str, messages: list[Message], lost: str
) -> None:
    chat_format = ChatFormat(tokenizer_for(template))
    for use in (
        lambda: chat_format.turns(Chat(messages, "f:1")),
        lambda: chat_format.prompt(messages[:-1], where="f:1"),
    ):
        with pytest.raises(DataError, match=rf"f:1: the chat template leaves out a part of message {lost}"):
            use()


def test_a_result_of_a_tool_that_the_template_shortens_is_refused() -> None:
    result = "'<|im_start|>user\n<tool_response>\n' + m.content"
    template = THINKING.replace(result, f"{result}[:5]")
    with pytest.raises(DataError, match=r"leaves out a part of message 3 \(role 'tool'\), such as 'rain', 'true'"):
        ChatFormat(tokenizer_for(template)).turns(Chat(CALLING, "f:1", tools=[TOOL]))


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        (TRIMMING, [{"role": "user", "content": "  a  b \n"}, ANSWER]),
        (CHATML.replace(CONTENT, f"{CONTENT}.replace('\n\n', '\n')"), [{"role": "user", "content": "a\n\nb"}, ANSWER]),
        # A message of the system in the user's turn, after the first question.
        ("{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}"
         "{% if loop.first and messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}<|im_end|>\n"
         "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
         [{"role": "system", "content": "Be brief."}, QUESTION, ANSWER, QUESTION, ANSWER]),
        # A result of a tool as JSON text, as Llama 3.1 has.
        (THINKING.replace("<tool_response>\n' + m.content +", "<tool_response>\n' ~ m.content | tojson ~"),
         [*CALLING[:2], {"role": "tool", "content": '{"rain": "yes, \\"heavy\\""}\n\nuntil'}, CALLING[3]]),
        # Reasoning of earlier answers.
        (THINKING, [QUESTION, {**ANSWER, "content": "<think>\nUp north.\n</think>\n\nOslo"}, QUESTION, ANSWER]),
        (CHATML, [{"role": "user", "content": "qat-edge probe 2."}, ANSWER, QUESTION, ANSWER]),
        (CHATML, [{"role": "system", "content": ""}, QUESTION, ANSWER]),
    ],
)  # fmt: skip
def test_a_template_that_only_moves_trims_or_quotes_texts_is_not_reported(
    template: str, messages: list[Message]
) -> None:
    tokenizer = tokenizer_for(template)
    assert not notes(Chat(messages, "row"), tokenizer)
    ChatFormat(tokenizer).prompt(messages[:-1])


def test_other_changes_of_texts_without_loss_are_counted() -> None:
    upper = tokenizer_for(CHATML.replace(CONTENT, f"({CONTENT} | upper if message.role == 'user' else {CONTENT})"))
    found = notes(Chat([QUESTION, ANSWER, QUESTION, ANSWER], "f:1"), upper)
    assert "shortens the text of 2 messages without loss (the first: f:1, message 1, role 'user')" in found
    # Switches that a template takes out of a text, as SmolLM3's does.
    switched = tokenizer_for(CHATML.replace(CONTENT, f"{CONTENT}.replace('/no_think', '')"))
    for role in ("system", "user"):
        chat = Chat([{"role": role, "content": "Briefly. /no_think"}, QUESTION, ANSWER], "f:1")
        assert f"1 message without loss (the first: f:1, message 1, role '{role}')" in notes(chat, switched)
    # Earlier answers.
    cut = tokenizer_for(CHATML.replace(CONTENT, f"({CONTENT} if loop.last or message.role == 'user' else 'Os')"))
    chat = Chat([QUESTION, ANSWER, QUESTION, ANSWER], "f:1")
    assert "the first: f:1, message 2, role 'assistant'" in notes(chat, cut)


def test_a_repeated_answer_that_the_template_leaves_out_is_refused() -> None:
    template = WITHOUT_REPETITIONS.replace("'user'", "'assistant'")
    with pytest.raises(DataError, match=r"leaves out a part of message 4 \(role 'assistant'\), such as 'Oslo'"):
        ChatFormat(tokenizer_for(template)).turns(Chat([QUESTION, ANSWER, QUESTION, ANSWER], "f:1"))


def test_a_changed_answer_is_expected_as_it_is_trained() -> None:
    tokenizer = tokenizer_for(CHATML.replace(CONTENT, f"{CONTENT} | upper"))
    (turn,) = ChatFormat(tokenizer).turns(Chat([QUESTION, {"role": "assistant", "content": "i"}], "f:1"))
    assert turn.is_rewritten
    assert turn.expected == "I" == AnswerReader(tokenizer).from_ids(turn.ids).strip()


def test_reasoning_that_the_template_leaves_out_is_refused() -> None:
    row = Chat([QUESTION, {**ANSWER, "reasoning": "Up north."}], "f:3")
    with pytest.raises(DataError, match=r"f:3: message 2: 'reasoning' has no effect"):
        ChatFormat(tokenizer_for(CHATML)).turns(row)


def test_arguments_of_the_template_are_passed_or_refused() -> None:
    tokenizer = tokenizer_for(THINKING)
    quiet = Chat([QUESTION, ANSWER], "f:3", template_arguments={"enable_thinking": False})
    (turn,) = ChatFormat(tokenizer).turns(quiet)
    assert tokenizer.decode(turn.prompt_ids).endswith("<think>\n\n</think>\n\n")
    assert tokenizer.decode(turn.ids[: turn.trained]) == "Oslo<|im_end|>"
    done = tokenization.tokenize([quiet, quiet], tokenizer, 512)
    assert done.template_arguments == {"enable_thinking": False}
    mixed = tokenization.tokenize([quiet, Chat([QUESTION, ANSWER], "f:4")], tokenizer, 512)
    assert mixed.template_arguments == {}
    for name in ("enable_thinkin", "tools", "chat_template"):
        with pytest.raises(DataError, match=f"f:3: .*'{name}'"):
            ChatFormat(tokenizer).turns(Chat([QUESTION, ANSWER], "f:3", template_arguments={name: False}))


# --- tools -------------------------------------------------------------------------------------------------


def test_calls_are_trained_and_results_are_not() -> None:
    tokenizer = tokenizer_for(THINKING)
    chat = Chat(CALLING, "row", tools=[TOOL])
    call = '<tool_call>\n{"name": "rain", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>'
    assert trained_texts(chat, tokenizer) == [
        f"<think>\n\n</think>\n\n{call}<|im_end|>",
        "<think>\n\n</think>\n\nYes.<|im_end|>",
    ]
    (_, first, *_), (last_prompt, last, *_) = tokenization.prompts([chat], tokenizer)
    reader = AnswerReader(tokenizer)
    assert reader.from_text(first).strip() == call and last == "Yes."
    text = tokenizer.decode(last_prompt)
    assert json.dumps(TOOL) in text and call in text and '<tool_response>\n{"rain": true}' in text
    # Equal as JSON, not as text.
    assert outputs_match(
        call.replace('{"city": "Oslo", "days": 2}', '{"days":2,"city":"Oslo"}'), reader.from_text(first)
    )
    assert not outputs_match(call.replace("2", "3"), reader.from_text(first))


@pytest.mark.parametrize("arguments", [{"city": "Oslo"}, {}])
def test_arguments_become_text_where_the_template_reads_text(arguments: dict[str, Any]) -> None:
    tokenizer = tokenizer_for(CALLS_AS_TEXT)
    call = {"type": "function", "function": {"name": "rain", "arguments": arguments}}
    chat = Chat([QUESTION, {"role": "assistant", "tool_calls": [call]}], "row", tools=[TOOL])
    assert trained_texts(chat, tokenizer) == [f"rain {json.dumps(arguments)}<|im_end|>"]


def test_tools_and_calls_that_the_template_leaves_out_are_refused() -> None:
    without_calls = THINKING.replace("m.tool_calls or []", "[]")
    for template, chat, message in [
        (CHATML, Chat([QUESTION, ANSWER], "f:3", tools=[TOOL]), "'tools' have no effect: .* leaves out 'rain'"),
        (without_calls, Chat(CALLING[:2], "f:3", tools=[TOOL]), "message 2: 'tool_calls' have no effect"),
        (CALLS_AS_PYTHON, Chat(CALLING[:2], "f:3", tools=[TOOL]), "does not write arguments of tool calls as JSON"),
        (
            THINKING.replace("m.role == 'tool'", "m.role == 'result'"),
            Chat(CALLING, "f:3", tools=[TOOL]),
            r"leaves out message 3 \(role 'tool'\)",
        ),
        (ALTERNATING, Chat(CALLING, "f:3"), "f:3"),
        (CHATML, Chat([QUESTION, ANSWER], "f:3", documents=[{"text": "x"}]), "'documents' have no effect"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            ChatFormat(tokenizer_for(template)).turns(chat)
        assert str(caught.value).startswith("f:3: ")


def test_a_tool_call_in_a_message_without_loss_is_context() -> None:
    tokenizer = tokenizer_for(THINKING)
    chat = Chat([QUESTION, {**CALLING[1], "weight": 0}, *CALLING[2:]], "row", tools=[TOOL])
    assert trained_texts(chat, tokenizer) == ["<think>\n\n</think>\n\nYes.<|im_end|>"]
    with pytest.raises(DataError, match="message 2: 'tool_calls' have no effect"):
        ChatFormat(tokenizer_for(THINKING.replace("m.tool_calls or []", "[]"))).turns(chat)


def test_named_templates_are_chosen_by_the_tools() -> None:
    tokenizer = tokenizer_for({"default": CHATML, "tool_use": THINKING})
    assert trained_texts(Chat([QUESTION, ANSWER], "row"), tokenizer) == ["Oslo<|im_end|>"]
    assert "tool_call" in trained_texts(Chat(CALLING[:2], "row", tools=[TOOL]), tokenizer)[0]
    with pytest.raises(ModelError, match="cannot be read"):
        ChatFormat(tokenizer_for({"tool_use": THINKING})).turns(Chat([QUESTION, ANSWER], "row"))


# --- other conversations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, OWN_SYSTEM, OPEN])
def test_a_first_turn_of_the_assistant_is_trained_after_the_generation_prompt(template: str) -> None:
    tokenizer = tokenizer_for(template)
    first, second = ChatFormat(tokenizer).turns(Chat([ANSWER, QUESTION, ANSWER], "row"))
    assert tokenizer.decode(first.prompt_ids).rstrip().endswith(("<|im_start|>assistant", "<|assistant|>"))
    assert tokenizer.decode(first.ids[: first.trained]) == tokenizer.decode(second.ids[: second.trained])


def test_a_first_turn_that_the_template_refuses_is_named() -> None:
    with pytest.raises(DataError, match=r"f:3: the chat template refuses the roles assistant: .*must alternate"):
        ChatFormat(tokenizer_for(ALTERNATING)).turns(Chat([ANSWER, QUESTION, ANSWER], "f:3"))
    no_prompt = CHATML.replace("add_generation_prompt", "false")
    with pytest.raises(DataError, match="f:3: message 1 is the assistant's"):
        ChatFormat(tokenizer_for(no_prompt)).turns(Chat([ANSWER, QUESTION, ANSWER], "f:3"))


def test_a_system_message_that_is_refused_or_left_out_is_named() -> None:
    chat = Chat([{"role": "system", "content": "Be brief."}, QUESTION, ANSWER], "f:3")
    with pytest.raises(DataError, match=r"refuses the roles system, user.*: System role not supported"):
        ChatFormat(tokenizer_for(ALTERNATING)).turns(chat)
    silent = "{% for message in messages if message.role != 'system' %}" + CHATML.partition("%}")[2]
    with pytest.raises(DataError, match=r"leaves out message 1 \(role 'system'\)"):
        ChatFormat(tokenizer_for(silent)).turns(chat)


def test_a_prompt_from_which_the_template_leaves_something_out_is_refused() -> None:
    silent = "{% for message in messages if message.role != 'system' %}" + CHATML.partition("%}")[2]
    no_calls = THINKING.replace("m.tool_calls or []", "[]")
    system: Message = {"role": "system", "content": "e"}  # a text that the rest of the prompt has as well
    for template, messages, tools, message in [
        (silent, [system, QUESTION], None, r"leaves out message 1 \(role 'system'\)"),
        (silent, [{**system, "content": ""}, QUESTION], None, r"leaves out message 1 \(role 'system'\)"),
        (CHATML.replace("message['content']", "'x'"), [QUESTION], None, r"leaves out message 1 \(role 'user'\)"),
        (CHATML, [QUESTION], [TOOL], "'tools' have no effect: .* leaves out 'rain'"),
        (no_calls, CALLING[:3], [TOOL], "message 2: 'tool_calls' have no effect"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            ChatFormat(tokenizer_for(template)).prompt(messages, tools=tools, where="f:3")
        assert str(caught.value).startswith("f:3: ")


@pytest.mark.parametrize("template", [CHATML, OWN_SYSTEM, TRIMMING, THINKING, OPEN])
def test_the_prompt_after_a_dialogue_is_what_precedes_its_next_answer(template: str) -> None:
    tokenizer = tokenizer_for(template)
    chat = Chat([DIALOGUE[0], *CALLING], "row", tools=[TOOL]) if template == THINKING else Chat(DIALOGUE, "row")
    prompt = ChatFormat(tokenizer).prompt(chat.messages[:-1], tools=chat.tools)
    rendered = tokenizer.apply_chat_template(
        [{"content": "", **m} for m in chat.messages[:-1]], tools=chat.tools, tokenize=False, add_generation_prompt=True
    )
    assert prompt.text == rendered


def test_messages_without_weight_have_no_loss() -> None:
    tokenizer = tokenizer_for(CHATML)
    chat = Chat([QUESTION, {**ANSWER, "weight": 0}, QUESTION, {**ANSWER, "content": "Rome", "weight": 1}], "row")
    (row,) = tokenization.tokenize([chat], tokenizer, 512).rows
    assert tokenizer.decode([label for label in row["labels"] if label != IGNORED]) == "Rome<|im_end|>"
    assert "Oslo" in tokenizer.decode(row["input_ids"])
    ((_, expected, *_),) = tokenization.prompts([chat], tokenizer)
    assert expected == "Rome"


def test_fields_without_effect_and_unanswered_messages_are_counted() -> None:
    tokenizer = tokenizer_for(CHATML)
    named = Chat([{**QUESTION, "name": "Ada", "id": 7}, ANSWER, QUESTION], "row")
    found = "\n".join(tokenization.tokenize([named, named], tokenizer, 512).notes)
    assert "does not use: 'name' in 2, 'id' in 2 messages" in found
    assert "2 rows end with a message that no answer follows" in found
    using = tokenizer_for(CHATML.replace("message['role'] +", "message['role'] + message.name | default('') +"))
    assert "'name'" not in notes(Chat([{**QUESTION, "name": "Ada"}, ANSWER], "row"), using)
    labelled = tokenization.tokenize([Text("abc", "row", label="x", pair="y")], tokenizer, 64)
    assert "'label' in 1 row, 'text_pair' in 1 row" in labelled.notes[0]


def test_a_template_that_reads_the_clock_is_reported() -> None:
    assert "current date" in notes(Chat([QUESTION, ANSWER], "row"), tokenizer_for("{{ strftime_now('%Y') }}" + CHATML))


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        ("{% for %}", ModelError, "cannot be read"),
        ("{% break %}", ModelError, "cannot be read"),
        ("{{ messages[0]['content'] + 1 }}", DataError, "cannot write the messages of user, assistant"),
        ("{{ messages | sum }}", DataError, "f:3"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", DataError, "recursion"),
        ("{{ messages[0].content.a.b }}", DataError, "refuses the roles"),
        ("{{ 1 / 0 }}", DataError, "ZeroDivisionError"),
        ("{{ range(999999) }}", DataError, "OverflowError"),
        ("{{ 9 ** 9 ** 9 }}", ModelError, "it computes a power"),
    ],
)
def test_a_template_that_fails_gives_one_paragraph(template: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ChatFormat(tokenizer_for(template)).turns(Chat([QUESTION, ANSWER], "f:3"))


def test_rows_of_tools_go_from_the_file_to_the_tokens(tmp_path: Path) -> None:
    path = tmp_path / "tools.jsonl"
    rows = [
        {"tools": [TOOL], "messages": [QUESTION, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
        {"tools": json.dumps([TOOL["function"]]), "messages": [{**m, "name": None} for m in CALLING]},
    ]
    path.write_text("\ufeff" + "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    loaded = load_rows(str(path))
    tokenizer = tokenizer_for(THINKING)
    done = tokenization.tokenize(loaded, tokenizer, 1024)
    texts = [tokenizer.decode([label for label in row["labels"] if label != IGNORED]) for row in done.rows]
    assert sum('"arguments": {"city": "Oslo", "days": 2}' in text for text in texts) == 2
    assert done.end_of_turn == (tokenizer.eos_token_id,) and not done.notes
