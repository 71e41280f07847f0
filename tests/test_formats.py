"""Formats: exact strings against their published sources, and conversions that lose nothing or refuse."""
import json

import jinja2, pytest
from hypothesis import given, settings, strategies as st

from ftcourse.data.formats import (
    alpaca_text, check_messages, format_input, format_response, from_alpaca_pair, from_alpaca_text, from_georgian_prompt, from_hh, from_phi3_text,
    from_summaries, from_transcript, georgian_prompt, phi3_text, row_kind, split_pair, template_text, to_alpaca, to_messages, to_prompt_completion,
    to_sharegpt, to_text_target, to_transcript)
from ftcourse.data.formats import PREAMBLE, ROLES
from ftcourse.data.reading import read_rows
from ftcourse.data.sets import load_set

FUZZ = settings(max_examples=200, deadline=None, derandomize=True, database=None)
MARKS = ["\n\n### Input:\n", "\n\n### Response:\n", "### Instruction:", "\n\nHuman:", "\n\nAssistant: ", "<|end|>", "<|user|>\n", "###პასუხი:", "\n###პასუხი:", "###ინსტრუქცია: ",
         "\n", "\n\n", " ", "\u2028", "😀", "ყ", "", "\n\n### Input:", "\n### Input:\n", "\n\n### Response:", "\n### Response:\n", "{x}", "%s", "\\"]
texts = st.lists(st.sampled_from(MARKS) | st.text(max_size=5), max_size=6).map("".join)
plain = st.lists(st.sampled_from(["Hi", " ", "ყ 😀", "\n", "a.", "{x}"]), min_size=1, max_size=5).map("".join)
extras = st.fixed_dictionaries({}, optional={"id": st.integers(), "source": st.none() | st.text(max_size=3), "weights": st.lists(st.floats(allow_nan=False), max_size=2)})


def message(role, content=texts): return st.fixed_dictionaries({"role": st.just(role), "content": content})


@st.composite
def chats(draw, content=texts):
    "{'messages': [...]} with an optional system message, one to three turns and other keys."
    system = draw(st.lists(message("system", content), max_size=1))
    turns = draw(st.lists(st.tuples(message("user", content), message("assistant", content)), min_size=1, max_size=3))
    return {"messages": [*system, *(m for t in turns for m in t)], **draw(extras)}


def refusal(function, *args, **kwargs):
    "The text of the ValueError that must come."
    with pytest.raises(ValueError) as caught: function(*args, **kwargs)
    return str(caught.value)


# --- exact strings ------------------------------------------------------------------------------------------
TUTORIAL = [  # typed from the book's printed example, chapter 7
    ({"instruction": "Identify the correct spelling of the following word.", "input": "Ocassion", "output": "The correct spelling is 'Occasion.'"},
     "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
     "### Instruction:\nIdentify the correct spelling of the following word.\n\n### Input:\nOcassion\n\n### Response:\nThe correct spelling is 'Occasion.'"),
    ({"instruction": "What is an antonym of 'complicated'?", "input": "", "output": "An antonym of 'complicated' is 'simple'."},
     "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
     "### Instruction:\nWhat is an antonym of 'complicated'?\n\n### Response:\nAn antonym of 'complicated' is 'simple'.")]


@pytest.mark.parametrize("entry, text", TUTORIAL)
def test_alpaca_strings(entry, text):
    assert alpaca_text(entry) == text == format_input(entry) + format_response(entry)
    assert format_input(entry) == text[:text.index("\n\n### Response:")]
    assert format_input(entry) + format_response({}) == text[:text.index("\n\n### Response:\n") + len("\n\n### Response:\n")]
    assert from_alpaca_text(text) == entry


def test_alpaca_input_only_where_there_is_one():
    for nothing in ({}, {"input": ""}, {"input": None}): assert "### Input" not in format_input({"instruction": "x", **nothing})
    assert format_input({"instruction": "x", "input": " "}).endswith("\n\n### Input:\n ")  # as the tutorial's `if entry["input"]`


PHI3 = ("{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
        "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}")  # published in Phi-3-mini-4k-instruct's tokenizer_config.json


@FUZZ
@given(chats(), st.booleans())
def test_phi3_equals_the_published_template(row, asks):
    template = jinja2.Environment(keep_trailing_newline=True).from_string(PHI3)
    try: ours = phi3_text(row, asks, eos="<|endoftext|>")
    except ValueError:
        assert any(mark in m["content"] for m in row["messages"] for mark in ("<|end|>", "<|user|>"))
        return
    assert ours == template.render(messages=row["messages"], add_generation_prompt=asks, eos_token="<|endoftext|>")
    if not asks: assert from_phi3_text(ours)["messages"] == from_phi3_text(phi3_text(row))["messages"] == row["messages"]


def test_phi3_by_hand():
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert phi3_text(chat) == "<|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>\n"
    assert phi3_text(chat[:1], add_generation_prompt=True) == "<|user|>\nHi<|end|>\n<|assistant|>\n"
    assert "no role function" in refusal(phi3_text, [{"role": "function", "content": "x"}])
    for text in ("<|User|>\nHi", "", "<|user|>\nHi", "<|user|>\nHi<|end|>\nrest", "x<|user|>\nHi<|end|>\n"): refusal(from_phi3_text, text)


def test_georgian_by_hand():
    assert georgian_prompt("Q?") == "###ინსტრუქცია: Q?\n###პასუხი:" and georgian_prompt("Q?", "A.") == "###ინსტრუქცია: Q?\n###პასუხი: A."
    assert [f"U+{ord(c):04X}" for c in georgian_prompt("")[3:6]] == ["U+10D8", "U+10DC", "U+10E1"]  # Mkhedruli letters in, n, s


# --- there and back -----------------------------------------------------------------------------------------
@FUZZ
@given(texts, texts, texts)
def test_alpaca_text_and_back(instruction, given, output):
    row = {"instruction": instruction, "input": given, "output": output}
    try: text = alpaca_text(row)
    except ValueError: assert "###" in instruction + given + output
    else: assert from_alpaca_text(text) == row and text == format_input(row) + format_response(row)


@FUZZ
@given(texts, texts)
def test_georgian_and_back(instruction, answer):
    try: assert from_georgian_prompt(georgian_prompt(instruction, answer)) == {"prompt": instruction, "completion": answer}
    except ValueError: assert "###" in instruction + answer


@FUZZ
@given(texts, texts, texts, extras)
def test_alpaca_to_all_and_back(instruction, given, output, more):
    row = {"instruction": instruction, "input": given, "output": output, **more}
    try: chat = to_messages(row)
    except ValueError:
        assert "### Input" in instruction + given
        return
    for there in (chat, to_sharegpt(row), to_prompt_completion(row), to_prompt_completion(row, text=True), to_text_target(row)): assert to_alpaca(there) == row


@FUZZ
@given(chats())
def test_messages_to_all_and_back(row):
    assert to_messages(row) == row
    assert to_messages(to_sharegpt(row)) == row == to_messages(to_prompt_completion(row))
    for convert in (to_alpaca, to_text_target, lambda r: to_prompt_completion(r, text=True)):
        try: assert to_messages(convert(row)) == row
        except ValueError: assert len(row["messages"]) != 2 or "### Input" in row["messages"][0]["content"]


@FUZZ
@given(chats(plain))
def test_plain_chats_are_never_refused(row):
    if len(row["messages"]) == 2:
        for convert in (to_alpaca, to_text_target): assert to_messages(convert(row)) == row
    if row["messages"][0]["role"] == "user":
        assert from_transcript(to_transcript(row["messages"])) == row["messages"]


@FUZZ
@given(st.lists(st.sampled_from(["user", "assistant"]), min_size=1, max_size=5), st.data())
def test_transcript_and_back(roles, data):
    messages = [{"role": r, "content": data.draw(texts)} for r in roles]
    try: text = to_transcript(messages)
    except ValueError: assert any("\n\nHuman:" in m["content"] or "\n\nAssistant:" in m["content"] for m in messages)
    else: assert from_transcript(text) == messages


# --- what is legal stays, what cannot be held is refused ----------------------------------------------------
CALLS = [{"role": "system", "content": "s"}, {"role": "user", "name": "nino", "content": "q"},
         {"role": "assistant", "content": None, "function_call": {"name": "clock", "arguments": "{}"}}, {"role": "function", "name": "clock", "content": "12:30"},
         {"role": "assistant", "content": "Half past twelve."}]


def test_openai_messages():
    assert to_messages(CALLS) == {"messages": CALLS} == to_messages({"messages": CALLS})
    row = {"messages": CALLS, "functions": [{"name": "clock"}]}
    assert to_messages(row) == row and to_messages(to_prompt_completion(row)) == row
    for convert in (to_alpaca, to_sharegpt, to_text_target, phi3_text): assert "name" in refusal(convert, row)
    assert to_messages([*CALLS[:2], {"role": "assistant", "tool_calls": [{"id": "1"}]}, {"role": "tool", "content": "x", "tool_call_id": "1"}])
    filled = {"messages": [{"role": "user", "content": "q", "name": None}, {"role": "assistant", "content": "a", "name": None, "function_call": None}]}
    assert to_alpaca(filled) == {"instruction": "q", "input": "", "output": "a"}  # Parquet fills missing keys with None


@pytest.mark.parametrize("bad, words", [
    ([], "at least one"), ([3], "message 0 must be a dict"), ([{"role": "bot", "content": "x"}], "'bot'"), ([{"content": "x"}], "None"), ([{"role": "user"}], "no text"),
    ([{"role": "user", "content": None, "function_call": {"name": "f", "arguments": ""}}], "no text"), ([{"role": "user", "content": ["x"]}], "no text"),
    ([CALLS[0], {"role": "assistant", "content": 3}], "message 1"), ([{"role": "user", "content": "x", "name": 3}], "name"), ([{"role": ["user"], "content": "x"}], "role"),
    ([{"role": "assistant", "content": None, "function_call": "f"}], "function_call"), ([{"role": "assistant", "content": None, "function_call": {"name": "f"}}], "function_call")])
def test_bad_messages(bad, words):
    assert words in refusal(check_messages, bad) and words in refusal(to_messages, {"messages": bad})


def test_system():
    row = {"prompt": "q", "completion": "a"}
    chat = to_messages(row, system="s")
    assert chat == {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    assert to_messages(chat, system="s") == chat and row == {"prompt": "q", "completion": "a"}
    assert "system" in refusal(to_messages, chat, system="other") and "system" in refusal(to_alpaca, chat)
    for shape in ({"instruction": "q", "output": "a", "system": "s"}, {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"}):
        assert to_messages(shape) == chat


def test_multi_turn_and_other_refusals():
    two = {"messages": [{"role": r, "content": "x"} for r in ("user", "assistant", "user", "assistant")]}
    for convert in (to_alpaca, to_text_target): assert "one user's" in refusal(convert, two)
    refusal(to_prompt_completion, two, text=True)
    refusal(to_prompt_completion, {"messages": two["messages"][:3]})
    refusal(to_prompt_completion, {"messages": two["messages"][1:2]})
    refusal(to_messages, {"instruction": "q", "output": "a", "history": [["a", "b"]]})
    for turn in ({"from": "observation", "value": "x"}, {"from": "human"}, {"from": "human", "value": "x", "loss": 0}, "x"): refusal(to_messages, {"conversations": [turn]})
    for row in ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"text": "x"}, {"prompt": "q", "completion": "a", "label": False}, {"prompt": "q", "completions": ["a"]}):
        assert row_kind(row) in refusal(to_messages, row)
    for value in (3, None, {"a": 1}): refusal(to_messages, {"prompt": "q", "completion": value})


def test_extra_keys_are_kept_or_refused():
    base = {"prompt": "q", "completion": "a"}
    assert to_messages({**base, "id": 1})["id"] == 1 and to_alpaca({**base, "source": "web"})["source"] == "web"
    for key, convert in (("input", to_alpaca), ("history", to_alpaca), ("system", to_sharegpt), ("text", to_text_target)):
        assert repr(key) in refusal(convert, {**base, key: "kept?"})
        assert convert({**base, key: None})  # a column of another row, filled in by a table
    row = {"messages": CALLS[:2], "prompt": "x", "prompt_id": "y"}  # UltraChat has these beside messages
    assert to_messages(row) == row and "'prompt'" in refusal(to_prompt_completion, {**row, "messages": CALLS})


def test_row_kind():
    both = {"instruction": "q", "output": "a", "messages": CALLS}
    assert "alpaca" in refusal(row_kind, both) and "messages" in refusal(row_kind, both)
    assert row_kind({"prompt": "q", "completion": "a", "label": False}) == "unpaired" and row_kind({"prompt": "q", "completion": "a", "label": None}) == "prompt_completion"
    assert row_kind({"text": "x", "target": None}) == "text" and row_kind(CALLS) == "messages"
    for odd in ({}, {"a": 1}, 3, None, "x", {"text": 3}, {3: 4}): refusal(row_kind, odd)
    assert "split_pair" in refusal(row_kind, {"prompt": "q", "chosen": CALLS, "rejected": CALLS})
    assert "from_hh" in refusal(row_kind, {"chosen": "\n\nHuman: q", "rejected": "x"}) and "from_alpaca_pair" in refusal(row_kind, load_set("preferences")[0])
    assert row_kind({"prompt": CALLS[:2], "chosen": CALLS[-1:], "rejected": CALLS[-1:]}) == "preference"


# --- pairs --------------------------------------------------------------------------------------------------
HH = {"chosen": "\n\nHuman: How do I boil an egg?\n\nAssistant: Soft or hard?\n\nHuman: Soft\nplease\n\nAssistant: Six minutes.",
      "rejected": "\n\nHuman: How do I boil an egg?\n\nAssistant: Soft or hard?\n\nHuman: Soft\nplease\n\nAssistant: No idea. Assistant: is a word."}


def test_hh():
    pair = from_hh({**HH, "id": 3})
    assert [m["content"] for m in pair["prompt"]] == ["How do I boil an egg?", "Soft or hard?", "Soft\nplease"] and pair["id"] == 3
    assert pair["chosen"] == [{"role": "assistant", "content": "Six minutes."}] and pair["rejected"][0]["content"] == "No idea. Assistant: is a word."
    assert row_kind(pair) == "preference" and {s: to_transcript(pair["prompt"] + pair[s]) for s in HH} == HH
    assert from_hh({"chosen": "\n\nHuman: q\n\nAssistant:", "rejected": "\n\nHuman: q\n\nAssistant: a"})["chosen"][0]["content"] == ""
    for broken in ({**HH, "chosen": HH["chosen"] + "\n\nHuman: Thanks"}, {**HH, "rejected": HH["chosen"][2:]}, {**HH, "rejected": HH["rejected"].replace("egg", "potato")}, {**HH, "chosen": ""},
                   {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: a\n\nHuman: q\n\nAssistant: a"}): refusal(from_hh, broken)


def test_split_pair():
    user, good, bad = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}
    expected = {"prompt": [user], "chosen": [good], "rejected": [bad], "score": 1}
    for copy in ({}, {"prompt": "q"}, {"prompt": [user]}): assert split_pair({"chosen": [user, good], "rejected": [user, bad], "score": 1, **copy}) == expected
    assert "'prompt'" in refusal(split_pair, {"chosen": [user, good], "rejected": [user, bad], "prompt": "another"})
    refusal(split_pair, {"chosen": [good], "rejected": [bad]})


def test_summaries():
    "The row that OpenAI's README prints, shortened; its prompt as in their experiment_helpers.py."
    row = {"info": {"id": "t3_2vwp1w", "post": "I had a car accident on friday.\n\ncan I get an investigation {x}?", "title": "Dutch law?", "subreddit": "legaladvice"},
           "summaries": [{"text": " car accident.", "policy": "sup4_ppo_rm3_kl10", "note": "Was it fast."}, {"text": " we suspect speeding.", "policy": "ref", "note": "Unclear."}],
           "choice": 1, "worker": "ikN", "batch": "batch9", "split": "train", "extra": {"confidence": 8}}
    out = from_summaries(row)
    assert out["prompt"] == "SUBREDDIT: r/legaladvice\n\nTITLE: Dutch law?\n\nPOST: I had a car accident on friday.\n\ncan I get an investigation {x}?\n\nTL;DR:"
    assert (out["chosen"], out["rejected"], out["chosen_policy"], out["rejected_note"]) == (" we suspect speeding.", " car accident.", "ref", "Was it fast.")
    assert {k: out[k] for k in ("choice", "worker", "batch", "split", "extra")} == {k: row[k] for k in ("choice", "worker", "batch", "split", "extra")} and out["info"] == {"id": "t3_2vwp1w"}
    swapped = from_summaries({**row, "choice": 0})
    assert (swapped["chosen"], swapped["rejected"]) == (out["rejected"], out["chosen"]) and row_kind(swapped) == "preference"
    news = from_summaries({**row, "info": {"id": "1", "site": "x", "title": "t", "article": "News.", "post": None}})
    assert news["prompt"] == "Article:\nNews.\n\nTL;DR:\n" and news["info"]["title"] == "t"
    for broken in ({**row, "choice": 2}, {**row, "choice": None}, {**row, "summaries": row["summaries"][:1]}, {**row, "info": {"id": "1"}}, {**row, "prompt": "x"}): refusal(from_summaries, broken)


def test_alpaca_pairs():
    pairs = load_set("preferences")
    for row in pairs:
        out = from_alpaca_pair(row)
        user = out["prompt"][0]["content"]
        assert user == row["instruction"] + (f"\n\n### Input:\n{row['input']}" if row["input"] else "")
        assert (out["chosen"][0]["content"], out["rejected"][0]["content"]) == (row["chosen"], row["rejected"])
        assert out.get("output", row["chosen"]) == row["output"]


@pytest.mark.slow
def test_pairs_as_trl_splits_them():
    trl = pytest.importorskip("trl")
    for row in ({"chosen": from_transcript(HH["chosen"]), "rejected": from_transcript(HH["rejected"])},):
        theirs = trl.extract_prompt(row)
        assert {k: theirs[k] for k in ("prompt", "chosen", "rejected")} == split_pair(row)


# --- the model's own template -------------------------------------------------------------------------------
def test_template_text():
    from ftcourse.tokens import apply_template, tiny_tokenizer
    tokenizer = tiny_tokenizer()
    chat = [{"role": "user", "content": "Hi ყ"}, {"role": "assistant", "content": "Hello"}]
    text = "<|im_start|>user\nHi ყ<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    assert template_text(chat, tokenizer) == text == tokenizer.decode(apply_template(tokenizer, chat))
    assert template_text(chat[:1], tokenizer, add_generation_prompt=True) == text[:text.index("Hello")]
    assert "leaves out 'nino'" in refusal(template_text, CALLS[:2], tokenizer)
    assert "refuses" in refusal(template_text, CALLS[2:], tokenizer)
    tokenizer.chat_template = PHI3
    assert "leaves out '12:30' of message 2 (function)" in refusal(template_text, [*chat, {"role": "function", "content": "12:30"}], tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    assert "roles must alternate" in refusal(template_text, chat, tokenizer)
    tokenizer.chat_template = None
    assert "no chat template" in refusal(template_text, chat, tokenizer)


def test_from_file_to_rows(tmp_path):
    "What a file of bare lists holds comes out as messages."
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(CALLS) for _ in range(3)), encoding="utf-8")
    assert [to_messages(r) for r in read_rows(tmp_path / "a.jsonl")] == [{"messages": CALLS}] * 3
    assert set(m["role"] for m in CALLS) <= set(ROLES) and PREAMBLE.endswith("the request.")
