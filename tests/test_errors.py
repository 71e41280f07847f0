"""Kinds of error: distances against NLTK, rules by eye, tags that survive a crash and a new order."""
import json
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from ftcourse.data.sets import data_dir, emoji_codes, load_set
from ftcourse.evals.errors import (KINDS, answer_key, edit_distance, emojibot_right, emojibot_rules, judge_prompt, judge_rule, kind_shares, misspelt_as, read_tags, repeated_share,
                                   tag_by_hand, tag_errors)
from ftcourse.exercises import solution

ROWS = [{"q": "1 + 1?"}, {"q": "2 + 2?"}, {"q": "3 + 3?"}]
words = st.text("abç(ა", max_size=8)


@settings(deadline=None)
@given(words, words)
def test_distances_equal_nltks(a, b):
    from nltk import edit_distance as theirs
    assert edit_distance(a, b) == theirs(a, b)
    assert edit_distance(a, b) >= solution("errors.2")(a, b)


def test_every_code_with_one_letter_less_is_found():
    codes = list(emoji_codes())
    for code in codes:
        assert misspelt_as(code, codes) is None
        typed = code[:-2] + ")"
        if len(code) >= 6 and typed not in codes: assert edit_distance(typed, misspelt_as(typed, codes)) == 1
    assert misspelt_as("(zzzz)", codes) is None and misspelt_as("", codes) is None and misspelt_as("x", []) is None


def test_repeats_by_hand():
    assert repeated_share("A b c a B C") == pytest.approx(1/4)  # abc bca cab abc
    assert repeated_share("") == 0 and repeated_share("one two") == 0 and repeated_share("a a", 1) == 0.5


def test_rules_on_kept_answers():
    "Counts by eye of the first answers of the demo's base: prose is wrong in form and too long; right answers have no kind."
    study, test = json.loads((data_dir()/"results"/"emojibot.json").read_text()), load_set("emojibot", "test")
    tags = tag_errors(study["answers"]["base"], test, emojibot_rules(), emojibot_right)
    assert all("wrong format" in t for t in tags)
    tuned = tag_errors(study["answers"]["sft"], test, emojibot_rules(), emojibot_right)
    assert sum(not t for t in tuned) == round(200*study["systems"]["sft"]["acceptable"]) and all(t in ([], ["semantic"]) for t in tuned)


def test_a_rule_may_give_kinds_or_yes():
    rules = {"a": lambda answer, row: answer == "x", "more": lambda answer, row: ["b", "a"] if answer == "x" else []}
    assert tag_errors(["x", "y"], ROWS[:2], rules) == [["a", "b"], []]
    assert tag_errors(["x", "y"], ROWS[:2], rules, right=lambda answer, row: True) == [[], []]
    with pytest.raises(ValueError, match="2 answers to 3 rows"): tag_errors(["x", "y"], ROWS, rules)


def test_shares_count_answers_not_tags():
    found = kind_shares([["a"], ["a", "b"], [], []])
    assert list(found) == ["a", "b"] and found["a"]["n"] == 2 and found["a"]["share"] == 0.5 and found["b"]["interval"][0] == 0
    assert kind_shares([[], []]) == {}


@pytest.mark.parametrize("reply, kinds", [("factual", ["factual"]), ("Too long, and MISSPELT", ["misspelt", "too long"]), (" None.", []), ("nonesuch", ["unreadable"]), ("", ["unreadable"]),
                                          ("semantics", ["unreadable"])])
def test_a_judges_reply_is_read(reply, kinds):
    asked = []
    assert judge_rule(lambda prompt: asked.append(prompt) or reply)("two", ROWS[0]) == kinds
    assert "q: 1 + 1?" in asked[0] and "answer: two" in asked[0] and all(f"- {k}: " in asked[0] for k in KINDS) and asked == [judge_prompt("two", ROWS[0])]


def test_tags_survive_a_crash_and_a_new_order(tmp_path):
    file, answers = tmp_path/"tags.jsonl", ["2", "5", "six"]
    def crash(question): raise EOFError
    assert tag_by_hand(answers, ROWS, file, "Ana", ask=crash, tell=lambda t: None) == [None]*3 and not file.exists()
    typed = iter(["", "q", "F e", "stop"])
    shown = []
    assert tag_by_hand(answers, ROWS, file, "Ana", ask=lambda q: next(typed), tell=shown.append) == [[], ["semantic", "factual"], None]
    assert any("no kind q" in s for s in shown)
    assert tag_by_hand(answers[::-1], ROWS[::-1], file, "Ana", ask=crash, tell=lambda t: None) == [None, ["semantic", "factual"], []]
    assert tag_by_hand(answers, ROWS, file, "Ben", ask=lambda q: "b", tell=lambda t: None) == [["too long"]]*3  # another person's own tags
    assert tag_by_hand(["2", "4", "six"], ROWS, file, "Ana", ask=crash, tell=lambda t: None)[1] is None  # the answer changed
    assert len(read_tags(file)) == 5 and answer_key({"a": 1, "b": 2}, "x") == answer_key({"b": 2, "a": 1}, "x") and read_tags(Path(tmp_path/"none")) == {}
