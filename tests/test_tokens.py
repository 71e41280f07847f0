"What the chapter on tokens doesn't show: fuzzing, faults, other templates."
import subprocess, sys

import pytest
from hypothesis import given, settings, strategies as st

from ftcourse.tokens import ARTICLE_1, CHATML, apply_template, end_of_turn_id, has_template, pieces, tiny_tokenizer, tokens_per_character

TINY = tiny_tokenizer()
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@settings(max_examples=300, deadline=None)
@given(TEXT)
def test_any_text_comes_back(text):
    ids = TINY(text)["input_ids"]
    assert TINY.decode(ids) == text
    if "<|" not in text: assert ids == [b + 3 for b in text.encode()]


def test_markers_are_one_token_and_the_rest_is_bytes():
    assert TINY("<|im_start|>x<|im_end|>y<|endoftext|>")["input_ids"] == [1, ord("x") + 3, 2, ord("y") + 3, 0]


def test_control_characters_and_languages_come_back():
    for text in (*ARTICLE_1.values(), "\x00\x7f\r\n\t", "  ", "e\u0301", "\ufeffx", "🏳️‍🌈"):
        assert TINY.decode(TINY(text)["input_ids"]) == text


def test_every_call_makes_the_same_and_its_own():
    other = tiny_tokenizer()
    assert other.get_vocab() == TINY.get_vocab() and len(other) == 259
    other.chat_template = None
    assert has_template(TINY) and not has_template(other)


def test_saved_and_opened_by_transformers(tmp_path):
    from transformers import AutoTokenizer
    TINY.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "don't , stop .  მოდელი <|im_end|>"
    assert again(text)["input_ids"] == TINY(text)["input_ids"] and again.decode(again(text)["input_ids"]) == text
    assert (again.eos_token_id, again.pad_token_id, again.chat_template) == (2, 2, CHATML)


CONTENT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda s: "<|" not in s)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), CONTENT), min_size=1, max_size=4), st.booleans())
def test_chat_ids_by_hand(turns, opens):
    # item 49: ids, not a BatchEncoding; each turn built here byte by byte
    def raw(s): return [b + 3 for b in s.encode()]
    expected = [i for role, content in turns for i in (1, *raw(f"{role}\n{content}"), 2, *raw("\n"))] + ([1, *raw("assistant\n")] if opens else [])
    got = apply_template(TINY, [{"role": r, "content": c} for r, c in turns], add_generation_prompt=opens)
    assert type(got) is list and got == expected


def test_opening_an_answer_only_adds_at_the_end():
    chat = [{"role": "user", "content": "hi"}]
    assert apply_template(TINY, chat, True)[:len(apply_template(TINY, chat))] == apply_template(TINY, chat)


def test_no_template_says_what_to_do():
    plain = tiny_tokenizer()
    plain.chat_template = None
    with pytest.raises(ValueError, match="apply_template: .*no chat template"): apply_template(plain, [{"role": "user", "content": "hi"}])
    assert end_of_turn_id(plain) == plain.eos_token_id == 2


def test_a_refusing_template_says_which_chat():
    strict = tiny_tokenizer()
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="apply_template: .*roles must alternate"): apply_template(strict, [{"role": "user", "content": "hi"}])


def test_missing_content_is_a_value_error():
    with pytest.raises(ValueError, match="apply_template"): apply_template(TINY, [{"role": "user", "content": None}])


@pytest.mark.parametrize("template, added, expected", [
    ("{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}<|endoftext|>", "<|end|>", "<|end|>"),  # Phi-3
    ("{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n{% endfor %}", "<end_of_turn>", "<end_of_turn>"),  # Gemma
    ("{% for m in messages %}<|h|>{{ m['role'] }}\n\n{{ m['content'] }}<|eot_id|>{% endfor %}", "<|eot_id|>", "<|eot_id|>"),  # Llama 3
    ("{% for m in messages %}{{ m['content'] }} {% endfor %}", None, "<|im_end|>"),  # nothing special: eos
])
def test_end_of_turn_of_other_families(template, added, expected):
    tokenizer = tiny_tokenizer()
    if added: tokenizer.add_tokens([added], special_tokens=True)
    tokenizer.chat_template = template
    assert tokenizer.convert_ids_to_tokens(end_of_turn_id(tokenizer)) == expected


def test_no_end_at_all_is_an_error():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="end_of_turn_id"): end_of_turn_id(tokenizer)


@settings(max_examples=100, deadline=None)
@given(TEXT.filter(str.isascii))
def test_pieces_join_to_the_text(text): assert "".join(pieces(TINY, text)) == text


def test_tokens_per_character():
    assert [tokens_per_character(TINY, t) for t in ("abc", "γδ", "და", "😀")] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="empty"): tokens_per_character(TINY, "")


def test_importing_tokens_is_light():
    code = "import sys, ftcourse.tokens; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'datasets', 'tokenizers')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
