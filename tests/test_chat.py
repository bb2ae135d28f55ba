"""Chat data: which columns are conversations, how the template renders them, and which tokens belong to answers."""

import copy
import json
import re

import datasets
import pytest
import torch
from jobs import contents
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from eacmoe_lightning.calibration.blocks import Calibration
from eacmoe_lightning.calibration.recipe import Recipe
from eacmoe_lightning.calibration.solver import BlockSolver
from eacmoe_lightning.calibration.streams import Streams
from eacmoe_lightning.commands.trainer import calibration_trainer
from eacmoe_lightning.job.data import TextWindows
from eacmoe_lightning.job.qesc import QESC
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.originals import load_original
from eacmoe_lightning.pruning.rule import PruningRule
from eacmoe_lightning.run.directory import RunDirectory
from eacmoe_lightning.run.ranks import Ranks
from eacmoe_lightning.text.chat import conversation_tokens
from eacmoe_lightning.text.documents import read_documents
from eacmoe_lightning.text.rows import Conversation
from eacmoe_lightning.text.windows import Windows, cut_windows, token_windows

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (  # as in templates that are made for training
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}!{% endgeneration %}"
    "{% else %}U:{{ m.content }}\n{% endif %}{% endfor %}"
)
THOUGHTS = (  # Qwen3: thoughts before the last question are left out, and the prompt opens a new thought
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1].strip() if loop.index0 < ns.last else m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
STRICT = (  # Mistral, Gemma: no system turn, user and assistant in turns
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content + eos_token }}{% endfor %}"
)
WITHOUT_PROMPT = CHATML.partition("{% if add_generation_prompt %}")[0]  # knows no prompt for an answer
TALK = [
    {"role": "user", "content": "What is two and two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And three?"},
    {"role": "assistant", "content": "Four plus three is seven."},
]
ALPACA = {"instruction": "Add the numbers.", "input": "2 2", "output": "4"}


@pytest.fixture
def chat_tokenizer(tokenizer):
    """`chat_tokenizer(template)`: the bundled tokenizer with a chat template."""

    def make(template: str | None) -> PreTrainedTokenizerFast:
        changed = copy.deepcopy(tokenizer)
        changed.chat_template = template
        return changed

    return make


def answers(tokenizer, messages: list[dict], **row) -> list[str]:
    """The runs of tokens that count, decoded."""
    windows = cut_windows(
        [Conversation(messages, row.get("tools"), "row 1")], tokenizer, None, 400, answers_only=True, layout="separate"
    )
    ids, counts = windows.input_ids[0].tolist(), windows.counts[0].tolist()
    runs: list[list[int]] = []
    for before, now, token in zip([False, *counts], counts, ids, strict=False):
        if now and not before:
            runs.append([])
        if now:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


# --- from rows to conversations


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK, "id": 3},
        {"conversations": TALK},
        {"conversations": [{"from": {"user": "human"}.get(m["role"], "gpt"), "value": m["content"]} for m in TALK]},
        {"conversations": [{"from": {"user": "human"}.get(m["role"], "gpt"), "text": m["content"]} for m in TALK]},
        {"conversation": TALK},
        {"prompt": json.dumps(TALK[:3]), "completion": json.dumps(TALK[3:])},
        {"messages": [{**m, "role": {"user": "Human"}.get(m["role"], "Assistant")} for m in TALK]},
        {"prompt": TALK[:3], "completion": TALK[3:]},
        {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in TALK]},
        {"messages": [{**m, "name": None, "tool_calls": None} for m in TALK], "prompt": "What is two and two?"},
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_turns_in_the_forms_that_data_sets_have(tmp_path, row, kind):
    if kind == "jsonl":
        (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    elif kind == "parquet":
        datasets.Dataset.from_list([row]).to_parquet(tmp_path / "x.parquet")
    else:
        datasets.Dataset.from_list([row]).save_to_disk(tmp_path)
    (conversation,) = read_documents(str(tmp_path))
    assert conversation.messages == TALK and conversation.tools is None


@pytest.mark.parametrize(
    "row, question, answer",
    [
        ({"prompt": "a", "response": "b"}, "a", "b"),
        ({"prompt": "a", "completion": "b"}, "a", "b"),
        ({"question": "a", "answer": "b"}, "a", "b"),
        ({"instruction": "a", "response": "b", "context": "", "category": "x"}, "a", "b"),
        ({"instruction": "a", "context": "c", "response": "b"}, "a\n\nc", "b"),
        (ALPACA, "Add the numbers.\n\n2 2", "4"),
        ({"instruction": "a", "input": "", "output": "b"}, "a", "b"),
        ({"input": "a", "output": "b"}, "a", "b"),
        ({"instruction": "a", "input": 3, "output": "b"}, "a\n\n3", "b"),
        ({"instruction": "sort", "output": '[{"a": 1}, {"a": 2}]'}, "sort", '[{"a": 1}, {"a": 2}]'),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_question_and_its_answer_in_two_columns(tmp_path, row, question, answer, kind):
    path = tmp_path / f"x.{kind}"
    rows = datasets.Dataset.from_list([row])
    rows.to_json(path) if kind == "jsonl" else rows.to_csv(path)
    (conversation,) = read_documents(str(path))
    assert [(m["role"], m["content"]) for m in conversation.messages] == [("user", question), ("assistant", answer)]


def test_what_stands_beside_a_question_is_text_or_left_out(tmp_path, caplog):
    """HotpotQA has titles and sentences there."""
    contexts = [["one", "two"], {"title": ["t"], "sentences": [["one", "two"]]}, "three", None]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps({"question": "a", "answer": "b", "context": c}) for c in contexts))
    questions = [conversation.messages[0]["content"] for conversation in read_documents(str(path))]
    assert questions == ["a\n\none\n\ntwo", "a", "a\n\nthree", "a"]
    assert f"{path}: `context` of 1 of 4 rows is neither text nor a list of texts" in caplog.text


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
def test_an_answer_that_holds_the_whole_conversation_is_taken_alone(tmp_path, system):
    """As preference data has it: UltraFeedback's prompt is a text, others' are turns."""
    rows = [
        {"prompt": TALK[0]["content"], "chosen": system + TALK[:2], "rejected": []},
        {"prompt": system + TALK[:1], "chosen": TALK[:2]},
        {"prompt": system + TALK[:1], "chosen": TALK[1:2]},
        {"prompt": system + TALK[:1], "chosen": TALK[1]["content"]},
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read = [conversation.messages for conversation in read_documents(str(tmp_path / "x.jsonl"), "prompt,chosen")]
    assert read == [system + TALK[:2]] * 4


@pytest.mark.parametrize("column", ["chosen", "dialog", "text"])
@pytest.mark.parametrize("written", [json.dumps, str])
def test_turns_in_the_text_of_any_column(tmp_path, column, written):
    texts = [written(TALK), written([{"role": "admin", "content": "all"}]), '[{"role": "user", "content":', "[1, 2]"]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({column: text}) for text in texts))
    conversation, *rest = read_documents(str(tmp_path / "x.jsonl"), column)
    assert conversation.messages == TALK and rest == texts[1:]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_arguments_of_tools_do_not_get_the_fields_of_others(tmp_path, kind):
    """A table gives all dicts of a column the same fields, and nulls where a row has none."""
    calls = [{"type": "function", "function": {"name": "f", "arguments": a}} for a in ({"city": "x"}, {"n": [1]})]
    rows = [{"messages": [TALK[0], {"role": "assistant", "content": None, "tool_calls": [call]}]} for call in calls]
    rows = datasets.Dataset.from_list(rows)
    place = tmp_path / f"x.{kind}"
    {"jsonl": rows.to_json, "parquet": rows.to_parquet, "saved": rows.save_to_disk}[kind](place)
    read = [conversation.messages[1] for conversation in read_documents(str(place))]
    assert read == [{"role": "assistant", "content": "", "tool_calls": [call]} for call in calls]


def test_a_system_prompt_and_tools_beside_the_turns(tmp_path):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    rows = [{"conversations": TALK, "system": "Be brief.", "tools": json.dumps(tools)}, {"conversations": TALK}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, second = read_documents(str(tmp_path / "x.jsonl"))
    assert first.messages == [{"role": "system", "content": "Be brief."}, *TALK] and first.tools == tools
    assert second.messages == TALK and second.tools is None


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_the_turns_before_a_question_and_a_system_prompt_beside_it(tmp_path, kind):
    before = [["Hello.", "Hi."], ["And?", "Yes."]]
    rows = datasets.Dataset.from_list([{**ALPACA, "history": before, "system_prompt": "Be brief."}])
    path = tmp_path / f"x.{kind}"
    rows.to_json(path) if kind == "jsonl" else rows.map(lambda row: {"history": json.dumps(row["history"])}).to_csv(
        path
    )
    (conversation,) = read_documents(str(path))
    assert [message["role"] for message in conversation.messages] == ["system", *["user", "assistant"] * 3]
    contents = [message["content"] for message in conversation.messages]
    assert contents == ["Be brief.", "Hello.", "Hi.", "And?", "Yes.", "Add the numbers.\n\n2 2", "4"]


def test_a_history_is_pairs_or_turns_or_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps({**ALPACA, "history": history}) for history in (None, [], TALK)))
    assert [len(conversation.messages) for conversation in read_documents(str(path))] == [2, 2, 2 + len(TALK)]
    path.write_text(json.dumps({**ALPACA, "history": "Hello."}))
    with pytest.raises(ValueError, match="x.jsonl, line 1: field `history` holds str, not pairs"):
        read_documents(str(path))


def test_a_tokenizer_that_takes_no_template_is_refused(tokenizer):
    class MistralCommonBackend(type(tokenizer)):
        def apply_chat_template(self, conversation, tools=None):
            raise AssertionError("renders no answers")

    other = copy.deepcopy(tokenizer)
    other.__class__ = MistralCommonBackend
    with pytest.raises(ValueError, match="line 1: the tokenizer is a MistralCommonBackend.*takes no chat template"):
        conversation_tokens(Conversation(TALK, where="x, line 1"), other, answers=False)


def test_roles_that_only_the_template_knows_are_left_to_it(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "ipython", "content": "b"}]
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": turns}))
    assert read_documents(str(tmp_path / "x.jsonl"))[0].messages == turns


def test_turns_as_json_in_a_csv(tmp_path):
    datasets.Dataset.from_list([{"messages": json.dumps(TALK)}]).to_csv(tmp_path / "x.csv")
    (conversation,) = read_documents(str(tmp_path / "x.csv"))
    assert conversation.messages == TALK


def test_turns_as_python_prints_them(tmp_path):
    """As pandas writes a column of lists."""
    datasets.Dataset.from_list([{"messages": str(TALK)}, {"messages": "[INST] plain text"}]).to_csv(tmp_path / "x.csv")
    conversation, text = read_documents(str(tmp_path / "x.csv"))
    assert conversation.messages == TALK and text == "[INST] plain text"
    for cut in (json.dumps(TALK[0]), json.dumps(TALK)[:-5]):
        (tmp_path / "x.jsonl").write_text(json.dumps({"messages": cut}))
        with pytest.raises(ValueError, match=r"x.jsonl, line 1: field `messages` holds text that looks like turns"):
            read_documents(str(tmp_path / "x.jsonl"))


def test_null_and_empty_conversations_are_skipped(tmp_path, caplog):
    rows = [{"messages": None}, {"messages": []}, {"messages": TALK}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [document.messages for document in read_documents(str(tmp_path / "x.jsonl"))] == [TALK]
    assert "2 of 3 rows are null" in caplog.text


def test_parts_of_conversations_are_whole_conversations(tmp_path):
    rows = [{"prompt": str(i), "response": "x" * i} for i in range(10)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parts = [read_documents(f"{tmp_path}/x.jsonl[{part}]") for part in (":30%", "30%:")]
    assert [len(part) for part in parts] == [3, 7]
    assert parts[0] + parts[1] == read_documents(f"{tmp_path}/x.jsonl")


@pytest.mark.parametrize(
    "row, message",
    [
        ({"messages": [{"from": "narrator", "value": "x"}]}, "line 1, turn 1 of `messages` needs a string in `role`"),
        ({"messages": [{"role": None, "text": "x"}]}, "but `from` is None and the fields are ['text']"),
        ({"messages": ["hello"]}, "line 1, turn 1 of `messages` is str, not a dict"),
        (
            {"messages": [{"role": "user", "message": "x"}]},
            "turn 1 of `messages` has no `content`, but the fields message",
        ),
        ({"messages": [{"role": "model", "parts": [{"text": "x"}]}]}, "has no `content`, but the fields parts, role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "content": "x"}]}]},
            "but the fields content, type",
        ),
        (
            {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": None}]},
            "2 turns say nothing",
        ),
        ({"messages": [{"role": "user", "content": [{"text": "x"}, {}]}]}, "has a part without a string in `text`"),
        ({"messages": [{"role": "user", "content": 3}]}, "its content is int, not text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "has parts of type image: only text"),
        ({"messages": "user: hello"}, None),  # plain text in a column of that name
        ({"prompt": {"a": 1}, "response": "b"}, "a row needs a string in field `prompt`"),
        (
            {"chosen": "b"},
            "a row needs a string in field `text`, but has ['chosen']; name the column with --data.column",
        ),
    ],
)
def test_rows_that_are_no_conversations(tmp_path, row, message):
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    if message is None:
        assert read_documents(str(tmp_path / "x.jsonl")) == ["user: hello"]
        return
    with pytest.raises(ValueError) as error:
        read_documents(str(tmp_path / "x.jsonl"))
    assert message in str(error.value) and "x.jsonl" in str(error.value)


# --- from conversations to tokens


def test_tokens_are_those_of_the_template_with_nothing_between_conversations(chat_tokenizer):
    tokenizer = chat_tokenizer(CHATML)
    ids = tokenizer.apply_chat_template(TALK, return_dict=True)["input_ids"]
    windows = token_windows([Conversation(TALK)] * 5, tokenizer, None, len(ids))
    assert windows.tolist() == [ids] * 5
    # a text ends with end-of-sequence, because the template knows nothing of it
    text = tokenizer("one", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    mixed = token_windows(["one", Conversation(TALK)], tokenizer, 1, len(text) + len(ids))
    assert mixed[0].tolist() == text + ids


@pytest.mark.parametrize(
    "template, expected",
    [
        (CHATML, ["Four.<|im_end|>\n", "Four plus three is seven.<|im_end|>\n"]),
        (WITHOUT_PROMPT, ["Four.<|im_end|>\n", "Four plus three is seven.<|im_end|>\n"]),
        (MARKED, ["Four.!", "Four plus three is seven.!"]),
        (MARKED.replace("{% gen", "{%+ gen"), ["Four.!", "Four plus three is seven.!"]),
        (STRICT, [" Four.<|endoftext|>", " Four plus three is seven.<|endoftext|>"]),
    ],
)
def test_answers_are_marked_to_the_end_of_their_turn(chat_tokenizer, template, expected):
    assert answers(chat_tokenizer(template), TALK) == expected


def test_answers_are_marked_where_the_template_changes_earlier_turns(chat_tokenizer):
    talk = copy.deepcopy(TALK)
    talk[1]["content"] = "<think>\nFour, as I recall.\n</think>\n\nFour."
    talk[3]["content"] = "<think>\nSeven, four plus three.\n</think>\n\nSeven."
    first, last = answers(chat_tokenizer(THOUGHTS), talk)
    assert first == "Four." and last.startswith("Seven")  # the last turn's thoughts are the prompt's to open


def test_an_answer_that_repeats_the_question_is_marked_once(chat_tokenizer):
    talk = [{"role": "user", "content": "Say yes. yes"}, {"role": "assistant", "content": "yes"}]
    for template, expected in ((CHATML, "yes<|im_end|>\n"), (THOUGHTS, "yes")):
        assert answers(chat_tokenizer(template), talk) == [expected]


DATED = "{{ strftime_now('%d %B %Y %f') }}\n" + CHATML  # gpt-oss, Llama 3 and others tell the date


def test_a_template_that_tells_the_date_renders_the_same_every_day(chat_tokenizer):
    """Otherwise a run that is continued on another day would be refused, because its text has changed."""
    tokenizer = chat_tokenizer(DATED)
    ids = token_windows([Conversation(TALK)], tokenizer, 1, 16)[0]
    assert tokenizer.decode(ids).startswith("01 January 2026 00")
    assert answers(tokenizer, TALK) == answers(chat_tokenizer(CHATML), TALK)
    assert "January 2026" not in tokenizer.apply_chat_template(TALK, tokenize=False)  # elsewhere it is today


CALLS = (
    "{% for m in messages %}{{ m.role }}:{% for call in m.tool_calls %}{% for name, value in call.function.arguments"
    ".items() %}{{ name }}={{ value }}{% endfor %}{% else %}{{ m.content }}{% endfor %}\n{% endfor %}"
)
CALLS_AS_TEXT = CALLS.replace("{% for name, value in call.function.arguments.items() %}", "").replace(
    "{{ name }}={{ value }}{% endfor %}", "{{ '`' + call.function.arguments + '`' }}"
)


@pytest.mark.parametrize("template, expected", [(CALLS, "assistant:city=Rome"), (CALLS_AS_TEXT, '`{"city": "Rome"}`')])
def test_arguments_of_tools_as_json_text_are_what_the_template_takes(chat_tokenizer, template, expected):
    """Data sets have them as OpenAI's clients do, as text; most templates read a dict, some text."""
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    talk = [TALK[0], {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "sun"}]
    tokenizer = chat_tokenizer(template)
    assert expected in tokenizer.decode(conversation_tokens(Conversation(talk), tokenizer, False)[0])


def test_templates_by_name_without_a_default_are_refused(chat_tokenizer):
    tokenizer = chat_tokenizer({"rag": CHATML, "tool_use": CHATML})
    with pytest.raises(ValueError, match="chat templates for rag, tool_use, but no default: .* --data.chat_template"):
        answers(tokenizer, TALK)


def test_a_template_that_hides_an_answer_is_refused(chat_tokenizer):
    tokenizer = chat_tokenizer("{% for m in messages %}{{ m.content | upper }}{% endfor %}{{ messages | length }}")
    with pytest.raises(ValueError, match="row 1, turn 2: the chat template does not show where the answer is"):
        answers(tokenizer, TALK)


PARTS = (  # as in models that see images: contents are lists of parts
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{% if part.type == 'text' %}"
    "{{ part.text | trim }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_reads_parts_gets_parts(chat_tokenizer):
    """Given plain contents it would go through their letters and render none."""
    whole, parts = chat_tokenizer(CHATML), chat_tokenizer(PARTS)
    expected = token_windows([Conversation(TALK)] * 3, whole, None, 16)
    assert torch.equal(token_windows([Conversation(TALK)] * 3, parts, None, 16), expected)
    assert answers(parts, TALK) == answers(whole, TALK)


@pytest.mark.parametrize("template", ["{% for m in messages %}<|{{ m.role }}|>\n{% endfor %}", "Hello", ""])
def test_a_template_without_the_contents_is_refused(chat_tokenizer, template):
    with pytest.raises(
        ValueError, match="line 3: the chat template .*leaves out what the turns say.*--data.chat_templ"
    ):
        token_windows([Conversation(TALK, where="x.jsonl, line 3")], chat_tokenizer(template), 1, 4)


def test_a_template_in_a_json_file_is_that_under_its_name(chat_data, tmp_path):
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    (tmp_path / "other.json").write_text(json.dumps({"template": CHATML}))
    plain, named = (chat_data(chat_template=str(tmp_path / f"chat_template.{end}")) for end in ("jinja", "json"))
    assert named.calibration_digest == plain.calibration_digest
    with pytest.raises(ValueError, match=r"--data.chat_template: .*other.json has no template under `chat_template`"):
        chat_data(chat_template=str(tmp_path / "other.json")).setup("fit")


def test_without_a_template_the_error_says_what_to_do(chat_tokenizer):
    with pytest.raises(ValueError, match="line 3: the tokenizer has no chat template.*--data.chat_template FILE"):
        token_windows([Conversation(TALK, where="x.jsonl, line 3")], chat_tokenizer(None), None, 8)


def test_turns_that_the_template_refuses_are_named(chat_tokenizer):
    talk = [{"role": "system", "content": "Be brief."}, *TALK]
    with pytest.raises(
        ValueError, match="line 3: the chat template does not render turns of system, user, .*alternate"
    ):
        token_windows([Conversation(talk, where="x.jsonl, line 3")], chat_tokenizer(STRICT), None, 8)


# --- windows


def test_only_windows_with_answers_are_drawn_from(chat_tokenizer):
    tokenizer = chat_tokenizer(CHATML)
    talk = [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "Yes."}]
    windows = cut_windows([Conversation(talk)] * 20, tokenizer, 10, 16, seed=0, answers_only=True)
    assert windows.counts.shape == (10, 16) and windows.counts.any(1).all() and not windows.counts.all()
    counted = [tokenizer.decode(ids[counts]) for ids, counts in zip(windows.input_ids, windows.counts, strict=True)]
    assert all(text in "Yes.<|im_end|>\n" for text in counted)
    everything = cut_windows([Conversation(talk)] * 20, tokenizer, 10, 16, seed=0)
    assert everything.counts is None and not torch.equal(everything.input_ids, windows.input_ids)
    with pytest.raises(ValueError, match="which make 29 windows of 16 .* with answers, not 500"):
        cut_windows([Conversation(talk)] * 20, tokenizer, 500, 16, answers_only=True)


def test_plain_text_has_no_answers(chat_tokenizer):
    with pytest.raises(ValueError, match="x.txt holds plain text.*--data.answers_only.*--data.column"):
        cut_windows(["one"], chat_tokenizer(CHATML), None, 1, answers_only=True, source="x.txt")


def test_separate_documents_begin_windows_and_the_filling_does_not_count(tokenizer):
    texts = ["one", "two words", "a text that is longer than one window of eight tokens, by a good deal"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    windows = cut_windows(texts, tokenizer, None, 8, layout="separate")
    expected = [part[i : i + 8] for part in ids for i in range(0, len(part), 8)]
    assert len(windows.input_ids) == len(expected) > 4
    for row, counts, tokens in zip(windows.input_ids.tolist(), windows.counts.tolist(), expected, strict=True):
        assert row == tokens + [tokenizer.eos_token_id] * (8 - len(tokens))
        assert counts == [True] * len(tokens) + [False] * (8 - len(tokens))
    full = " ".join(["word"] * 8)
    assert (
        len(cut_windows([full, full], tokenizer, None, len(tokenizer(full)["input_ids"]), layout="separate").counts)
        == 2
    )


def test_a_tokenizer_that_adds_tokens_begins_each_document_with_them(tokenizer):
    text, n = "one two three four", len(tokenizer("one two three four")["input_ids"])
    plain = token_windows([text, text], tokenizer, 1, 2 * n + 1)[0].tolist()
    adding = copy.deepcopy(tokenizer)
    adding._tokenizer.post_processor = TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", tokenizer.pad_token_id)]
    )
    first, bos = adding(text)["input_ids"], tokenizer.pad_token_id
    assert first == [bos, *plain[:n]]
    joined = token_windows([text, text], adding, 1, 2 * n + 3)[0].tolist()
    assert joined == [*first, tokenizer.eos_token_id, *first]
    # a window that begins inside a document has none, as in GPTQ; a text in pieces has one
    assert token_windows([text * 50], adding, None, 16).eq(bos).sum() == 1
    long = token_windows(["word " * 300_000], adding, 1000, 16)
    assert long.eq(bos).sum() == 1 and long[0, 0] == bos
    # a template adds its own
    adding.chat_template = CHATML
    ids = adding.apply_chat_template(TALK, return_dict=True)["input_ids"]
    assert bos not in ids and token_windows([Conversation(TALK)], adding, 1, len(ids))[0].tolist() == ids


# --- the data module


@pytest.fixture
def chat_data(tmp_path, tiny_model_dir):
    """`chat_data(...)`: a data module on 40 conversations, with the ChatML template in a file."""
    rows = [{"messages": [{**m, "content": f"{m['content']} ({i})"} for m in TALK]} for i in range(40)]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "chatml.jinja").write_bytes(b"\xef\xbb\xbf" + CHATML.encode())

    def make(**options) -> TextWindows:
        defaults = {
            "calibration": str(tmp_path / "chat.jsonl"),
            "heldout": ["bundled:prose"],
            "num_windows": 10,
            "window_length": 32,
            "batch_size": 4,
            "num_heldout_windows": 2,
            "tokenizer": str(tiny_model_dir("mixtral")),
            "chat_template": str(tmp_path / "chatml.jinja"),
            "answers_only": True,
        }
        return TextWindows(**defaults | options)

    return make


def test_weights_stand_beside_the_windows_in_the_module_and_in_its_batches(chat_data, tokenizer):
    data = chat_data()
    windows, weights = data.calibration_windows, data.calibration_weights
    assert weights.dtype == torch.bool and weights.shape == windows.shape == (10, 32)
    assert not re.search("What|user", tokenizer.decode(windows[weights]))
    batches = list(data.train_dataloader())
    assert [batch["global_tokens"] for batch in batches] == [int(weights[batch["index"]].sum()) for batch in batches]
    assert all(torch.equal(batch["weights"], weights[batch["index"]]) for batch in batches)
    assert chat_data(answers_only=False).calibration_weights is None
    assert "weights" not in next(iter(chat_data(answers_only=False).train_dataloader()))


def test_ranks_share_the_number_of_tokens_of_a_batch(chat_data):
    data = chat_data()
    loaders = []
    for rank in range(3):
        loader = data.train_dataloader()
        loader.rank, loader.world_size = rank, 3
        loaders.append(list(loader))
    for batches in zip(*loaders, strict=True):
        (number,) = {batch["global_tokens"] for batch in batches}
        assert number == sum(int(batch["weights"].sum()) for batch in batches) > 0


def test_what_counts_is_part_of_the_digest(chat_data):
    options = ({}, {"answers_only": False}, {"documents": "separate"}, {"documents": "separate", "answers_only": False})
    digests = [chat_data(**option).calibration_digest for option in options]
    assert len(set(digests)) == 4 and digests[0] == chat_data().calibration_digest


@pytest.mark.parametrize(
    "options, kind, message",
    [
        ({"chat_template": None}, ValueError, "chat.jsonl, line 1: the tokenizer has no chat template"),
        ({"chat_template": "/no/file"}, FileNotFoundError, "--data.chat_template: /no/file does not exist"),
        ({"column": "body"}, ValueError, "a row needs a string in field `body`, but has ['messages']"),
        ({"calibration": "bundled:prose"}, ValueError, "bundled:prose holds plain text"),
    ],
)
def test_bad_options(chat_data, options, kind, message):
    with pytest.raises(kind) as error:
        chat_data(**options).setup("fit")
    assert message in str(error.value) and "--data." in str(error.value)


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{% for m in messages %}", "line 1: Unexpected end of template"),
        ("{% for m in messages %}\n{{ m.content | upper_case }}{% endfor %}", "line 2: No filter named 'upper_case'"),
        ("{{ now() }}{% for m in messages %}{{ m.content }}{% endfor %}", "'now' is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[7].content.text }}", "no element 7"),
    ],
)
@pytest.mark.parametrize("answers_only", [False, True])
def test_a_broken_template_is_not_blamed_on_a_row(answers_only, template, reason, chat_data, tmp_path):
    (tmp_path / "broken.jinja").write_text(template)
    with pytest.raises(ValueError) as error:
        chat_data(chat_template=str(tmp_path / "broken.jinja"), answers_only=answers_only).setup("fit")
    assert "the chat template (--data.chat_template, or else the tokenizer's) is broken" in str(error.value)
    assert reason in str(error.value) and "chat.jsonl" not in str(error.value)


# --- what counts, in a run


def compress(run, data: TextWindows, model, **options) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of every block of a small run, by file."""
    trainer = calibration_trainer(run, progress_bar=False, accelerator="cpu", log_every_n_steps=1)
    settings = {"group_size": 32, "min_expert_tokens": 8} | options
    trainer.fit(QESC(str(model), **settings), data)
    return {path.name: load_file(path) for path in sorted((run / "blocks").iterdir())}


def is_same(one: dict[str, dict[str, torch.Tensor]], other: dict[str, dict[str, torch.Tensor]]) -> bool:
    return all(torch.equal(tensor, other[file][name]) for file in one for name, tensor in one[file].items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["ridge", "sgd"])
def test_what_counts_makes_another_model_and_counting_all_makes_the_same(method, chat_data, tiny_model_dir, tmp_path):
    model = tiny_model_dir("mixtral")
    answers = chat_data(heldout=[])

    def run(name: str, counts: torch.Tensor | None) -> dict[str, dict[str, torch.Tensor]]:
        data = chat_data(heldout=[])
        data._calibration = Windows(answers.calibration_windows, counts)
        return compress(tmp_path / name, data, model, router_method=method, joint_epochs=int(method == "sgd"))

    whole = run("whole", None)
    assert is_same(whole, run("ones", torch.ones_like(answers.calibration_windows, dtype=torch.bool)))
    assert contents(tmp_path / "whole" / "compressed") == contents(tmp_path / "ones" / "compressed")
    masked = run("answers", answers.calibration_weights)
    assert not is_same(whole, masked)
    report = json.loads((tmp_path / "answers" / "expert_frequency.json").read_text())
    num_counted = int(answers.calibration_weights.sum())
    assert all(sum(load) == 2 * num_counted for block in report.values() for load in block.values())


@torch.no_grad()
def test_the_filling_of_separate_documents_changes_nothing(chat_data, tiny_model_dir, tmp_path):
    moe, data = (
        MoEModel(load_original(str(tiny_model_dir("qwen2_moe")))),
        chat_data(answers_only=False, documents="separate"),
    )
    counts, selected = data.calibration_weights, []
    assert 0.2 < counts.float().mean() < 0.95
    for token in (0, 77):
        windows = data.calibration_windows.masked_fill(~counts, token)
        streams = Streams(moe, windows, 0, 4, RunDirectory(tmp_path / str(token)), Ranks(), counts=counts)
        streams.embed()
        for block in moe.blocks:
            routing = streams.advance(block, "x")
            streams.advance(block, "x_hat")
            streams.step(block.index + 1, keep=False)
            selected.append(streams.counted(routing.ids))
    for one, other in zip(selected[:3], selected[3:], strict=True):
        assert torch.equal(one, other) and one.shape == (int(counts.sum()), 2)


def test_hessians_are_sums_over_the_tokens_that_count(chat_data, tiny_model_dir, tmp_path):
    moe, data = MoEModel(load_original(str(tiny_model_dir("mixtral")))), chat_data()
    windows, counts = data.calibration_windows, data.calibration_weights
    streams = Streams(moe, windows, 0, 4, RunDirectory(tmp_path), Ranks(), counts=counts)
    streams.embed()
    block, x = moe.blocks[0], []
    handle = block.linear("self_attn.q_proj").register_forward_pre_hook(lambda _, args: x.append(args[0]))
    moe.model(windows)
    handle.remove()
    rows = x[0][counts].double()
    inputs = zip(streams.slices, streams.inputs_of(block, block.linear("self_attn.q_proj")), strict=True)
    solver = BlockSolver(block, len(moe.blocks), Recipe(group_size=32), Ranks())
    hessian = solver._hessian(streams.counted(x, part) for part, x in inputs)
    torch.testing.assert_close(hessian.double(), 2 / len(rows) * rows.T @ rows, rtol=1e-4, atol=1e-5)


def test_experts_are_scored_by_the_tokens_that_count(chat_data, tiny_model_dir, tmp_path):
    moe, data = MoEModel(load_original(str(tiny_model_dir("mixtral")))), chat_data()
    counts, block = data.calibration_weights, moe.blocks[0]
    streams = Streams(moe, data.calibration_windows, 0, 4, RunDirectory(tmp_path), Ranks(), counts=counts)
    streams.embed()
    calibration = Calibration(moe, Recipe(), streams, RunDirectory(tmp_path), Ranks(), pruning=PruningRule(keep=4))
    calibration.at = 0
    with calibration._measured() as scores, torch.no_grad():
        routing = streams.advance(block, "x")
    assert torch.equal(scores.load, torch.bincount(routing.ids[counts.flatten()].flatten(), minlength=8))
