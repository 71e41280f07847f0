"""The course's sets: complete, as published, apart from each other; and EmojiBot's score against cases decided by hand."""
import hashlib, subprocess, sys

import pytest
from hypothesis import given, settings, strategies as st

from ftcourse.data import sets
from ftcourse.data.sets import (EMOJI_SYSTEM, INSTRUCTGPT_MIX, NO_CODE, data_dir, distinct_share, emoji_codes, kind_of_use, load_set, mean_hidden, n_codes, nearest, score_emojibot, word_ngrams)

PUBLISHED = {  # first 16 digits of the sha256 of each file as published
    "instructions/instructions-1100.json": "7e09a9af353722ca", "preferences/preferences-1100.json": "305315abf14f65fa", "gsm8k/gsm8k-test.jsonl": "3730d312f6e34405", "humaneval/HumanEval.jsonl.gz": "b796127e635a67f9",
    "bbh/boolean_expressions.json": "ea6c754ec005e2d3", "bbh/date_understanding.json": "0148d4ac5fca05b2", "bbh/logical_deduction_five_objects.json": "d2df31394b903b7f", "bbh/movie_recommendation.json": "a8b53a87ee21a865",
}


def _message(row): return row["message"] if "message" in row else row["messages"][1]["content"]


@pytest.mark.parametrize("file", PUBLISHED)
def test_files_are_as_published(file): assert hashlib.sha256((data_dir() / file).read_bytes()).hexdigest()[:16] == PUBLISHED[file]


def test_every_set_has_card_and_licence():
    for folder in {name.split("/")[0] for name in sets._FILES}:
        card = (data_dir() / folder / "CARD.md").read_text(encoding="utf-8")
        for word in ("**Load:**", "**Origin:**", "**Licence:**", "**Known faults:**"): assert word in card, (folder, word)
        assert len((data_dir() / folder / "LICENSE").read_text(encoding="utf-8")) > 900


def test_card_counts_are_true():
    card = (data_dir() / "emojibot/CARD.md").read_text(encoding="utf-8")
    for split in ("train", "validation", "test"):
        n = len(load_set("emojibot", split))
        assert f"`{split}.jsonl` | {n:,}" in card
    assert f"| {len(emoji_codes())} codes |" in card
    for split in ("preferences", "preferences_test"):
        kinds = [r["kind"] for r in load_set("emojibot", split)]
        assert f"`{split}.jsonl` | {len(kinds)} pairs: {kinds.count('one_code')} `one_code`, {kinds.count('no_code')} `no_code` |" in card


def test_sets_are_small_enough_for_the_wheel():
    import zlib
    assert sum(len(zlib.compress(f.read_bytes())) for f in data_dir().rglob("*") if f.is_file() and f.parent.name != "results") < 1_500_000


@pytest.mark.parametrize("name,n", [("gsm8k", 1319), ("humaneval", 164), ("instructions", 1100), ("preferences", 1100), ("bbh/boolean_expressions", 250),
                                    ("bbh/date_understanding", 250), ("bbh/logical_deduction_five_objects", 250), ("bbh/movie_recommendation", 250)])
def test_sizes(name, n):
    rows = load_set(name)
    assert len(rows) == n and all(isinstance(r, dict) and set(r) == set(rows[0]) for r in rows)


def test_unknown_names_say_what_there_is():
    with pytest.raises(ValueError, match="emojibot, instructions"): load_set("imdb")
    with pytest.raises(ValueError, match="train, validation, test"): load_set("emojibot", "dev")
    with pytest.raises(ValueError, match="no split ''"): load_set("emojibot", "")


def test_missing_data_is_said(tmp_path, monkeypatch):
    class Spec: submodule_search_locations = [str(tmp_path / "ftcourse")]
    monkeypatch.setattr(sets.importlib.util, "find_spec", lambda name: Spec)
    with pytest.raises(FileNotFoundError, match="Install ftcourse again"): data_dir()
    (tmp_path / "ftcourse/_sets/emojibot").mkdir(parents=True)
    (tmp_path / "ftcourse/_sets/emojibot/codes.json").write_text("{}")
    assert data_dir() == tmp_path.resolve() / "ftcourse" / "_sets"


def test_loading_a_set_needs_no_torch():
    code = "import sys; from ftcourse.data.sets import load_set, score_emojibot; load_set('emojibot'); score_emojibot('(ok)', []); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


# --- EmojiBot -------------------------------------------------------------------------------------------
def test_emojibot_is_as_large_as_promised():
    codes, train, test = emoji_codes(), load_set("emojibot"), load_set("emojibot", "test")
    assert len(codes) >= 60 and len(train) >= 1000 and len(test) == 200 and len(load_set("emojibot", "validation")) >= 100
    assert {"(tired)", "(like)", "(sadkoala)"} <= set(codes) and len(set(codes.values())) == len(codes)
    answers = [r["messages"][2]["content"] for r in train]
    assert all(answers.count(c) >= 15 for c in codes)
    assert {c for r in test for c in r["acceptable"]} == set(codes)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_training_rows_are_chats(split):
    for row in load_set("emojibot", split):
        assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant"]
        assert row["messages"][0]["content"] == EMOJI_SYSTEM
        assert row["acceptable"][0] == row["messages"][2]["content"] and set(row["acceptable"]) <= set(emoji_codes())
        assert score_emojibot(row["messages"][2]["content"], row["acceptable"]) == {"format": True, "acceptable": True, "leaked": False}


def test_test_rows():
    for row in load_set("emojibot", "test"):
        assert set(row) == {"message", "acceptable"} and 1 <= len(row["acceptable"]) <= 4
        assert set(row["acceptable"]) <= set(emoji_codes()) and len(set(row["acceptable"])) == len(row["acceptable"])


def test_no_message_occurs_twice():
    messages = [" ".join(_message(r).lower().split()) for s in ("train", "validation", "test") for r in load_set("emojibot", s)]
    assert len(set(messages)) == len(messages)


def test_stories_of_the_sources():
    rows = {_message(r): r["messages"][2]["content"] for s in ("train", "validation") for r in load_set("emojibot", s)}
    assert rows["I've been working nonstop and need a break."] == "(tired)"
    assert rows["I just finished an amazing book, couldn't put it down!"] == "(like)"
    assert rows["A huge fire destroyed the koalas' habitat."] == "(sadkoala)"


def runs(text):
    "The runs of five and of three words, by plain string work, not by the package's n-grams."
    words = "".join(c if c.isalnum() or c == "'" else " " for c in text.lower()).split()
    return {" ".join(words[i:i + 5]) for i in range(len(words) - 4)}, {" ".join(words[i:i + 3]) for i in range(len(words) - 2)}


def test_no_run_of_five_words_is_shared_with_the_test_set():
    known = [runs(_message(r)) for s in ("train", "validation") for r in load_set("emojibot", s)]
    for row in load_set("emojibot", "test"):
        five, three = runs(_message(row))
        for f, t in known:
            assert not five & f, row
            assert len(three & t) <= 0.2 * max(1, len(three | t)), row


def test_messages_vary():
    messages = [_message(r) for r in load_set("emojibot")]
    words = [len(m.split()) for m in messages]
    assert min(words) <= 2 and max(words) >= 25 and sum(w >= 20 for w in words) >= 50
    assert distinct_share(messages) > 0.9
    assert sum(m[0].islower() for m in messages) > 200 and sum("?" in m for m in messages) > 100
    openings = [tuple(m.lower().split()[:2]) for m in messages]
    assert max(openings.count(o) for o in set(openings)) < 0.02 * len(messages)


@pytest.mark.slow
@pytest.mark.real
def test_no_test_message_means_what_a_training_row_means():
    import torch
    from ftcourse.models import load
    model, tokenizer = load("smollm2-135m", dtype=torch.float32)
    seen = [_message(r) for s in ("train", "validation") for r in load_set("emojibot", s)]
    train, test = (mean_hidden(model, tokenizer, texts) for texts in (seen, [_message(r) for r in load_set("emojibot", "test")]))
    a, b = test - train.mean(0), train - train.mean(0)
    cosine = (a / a.norm(dim=1, keepdim=True)) @ (b / b.norm(dim=1, keepdim=True)).T
    assert cosine.max() < 0.9, cosine.max()
    assert (nearest(test, train, centre=False)[0] > 0.9).float().mean() > 0.5  # why the mean must go: the chapter says so


def test_rows_go_into_datasets_and_back():
    import datasets
    rows = load_set("emojibot", "validation")
    assert datasets.Dataset.from_list(rows).to_list() == rows


# --- pairs ----------------------------------------------------------------------------------------------
def asks(row): return row["prompt"][1]["content"]


@pytest.mark.parametrize("split,source", [("preferences", "train"), ("preferences_test", "test")])
def test_pairs(split, source):
    rows, codes = load_set("emojibot", split), emoji_codes()
    known = {_message(r): r["acceptable"] for r in load_set("emojibot", source)}
    for row in rows:
        assert list(row) == ["prompt", "chosen", "rejected", "kind"]
        assert [m["role"] for m in row["prompt"] + row["chosen"] + row["rejected"]] == ["system", "user", "assistant", "assistant"]
        assert row["prompt"][0]["content"] == EMOJI_SYSTEM
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        if row["kind"] == "one_code":
            assert known[asks(row)] == [chosen]
            first, *others = rejected.split(" ")
            assert first == chosen and len({chosen, *others}) == 3 and set(others) <= set(codes)
        else:
            assert row["kind"] == "no_code" and asks(row) not in known
            assert chosen == NO_CODE == "No emoji fits that." and rejected[0] + rejected[-1] == "()" and rejected[1:-1].isalpha()
    assert len({asks(r) for r in rows}) == len(rows)
    assert len({r["chosen"][0]["content"] for r in rows if r["kind"] == "one_code"}) == (len(codes) if source == "train" else 40)


def test_pairs_to_train_on_hold_nothing_of_those_to_test_on():
    from ftcourse.cli import OTHER_PROMPTS
    tested = set().union(*(runs(t)[0] for t in [asks(r) for r in load_set("emojibot", "preferences_test")] + [*OTHER_PROMPTS] + [_message(r) for r in load_set("emojibot", "test")]))
    trained = [asks(r) for r in load_set("emojibot", "preferences")] + [_message(r) for s in ("train", "validation") for r in load_set("emojibot", s)]
    assert len(tested) > 300 and not [t for t in trained if runs(t)[0] & tested]
    assert not {asks(r).lower() for r in load_set("emojibot", "preferences")} & {t.lower() for t in [*OTHER_PROMPTS] + [asks(r) for r in load_set("emojibot", "preferences_test")]}


def test_messages_without_a_code_vary():
    for split in ("preferences", "preferences_test"):
        rows = [r for r in load_set("emojibot", split) if r["kind"] == "no_code"]
        openings = [tuple(asks(r).lower().split()[:2]) for r in rows]
        assert max(openings.count(o) for o in openings) <= 4 and distinct_share([asks(r) for r in rows]) > 0.95
        wrong = [r["rejected"][0]["content"] for r in rows]
        assert max(wrong.count(w) for w in wrong) <= 5 and sum(w not in emoji_codes() for w in wrong) <= 0.1 * len(wrong)


@pytest.mark.parametrize("answer,n", [("(tired)", 1), ("(tired) (sun) (bug)", 3), ("(ok)(ok)", 2), ("(calculator)", 1), (NO_CODE, 0), ("", 0), ("()", 0), ("(Tired)", 0), ("tired", 0), ("408", 0),
                                      ("The answer is 408.", 0), ("( ok )", 0), ("Say (hi) to all", 1), ("(ok) 😴", 1)])
def test_number_of_codes(answer, n): assert n_codes(answer) == n


# --- score ----------------------------------------------------------------------------------------------
ACCEPTABLE = ["(tired)", "(coffee)"]


@pytest.mark.parametrize("answer,form,right,leaked", [
    ("(tired)", 1, 1, 0), ("(coffee)", 1, 1, 0), ("(tired) (tired)", 1, 1, 0), ("(coffee)\n(tired)", 1, 1, 0), ("\t(tired) ", 1, 1, 0), ("(tired)(coffee)", 1, 1, 0),
    ("(sadkoala)", 1, 0, 0), ("(tired) (sadkoala)", 1, 0, 0), (" ".join(emoji_codes()), 1, 0, 0),
    ("", 0, 0, 0), ("   ", 0, 0, 0), ("()", 0, 0, 0), ("(tired)!", 0, 0, 0), ("(tired), (coffee)", 0, 0, 0), ("123", 0, 0, 0), (":-)", 0, 0, 0),
    ("((tired))", 0, 0, 0), ("( tired )", 0, 0, 1), ("(TIRED)", 0, 0, 1), (":tired:", 0, 0, 1), ("(tired) zzz", 0, 0, 1), ("(nosuchcode)", 0, 0, 1),
    ("(tired", 0, 0, 1), ("tired)", 0, 0, 1), ("устал", 0, 0, 1), ("დაღლილი", 0, 0, 1), ("疲", 0, 0, 1), ("Ⓜ️", 0, 0, 1), ("1️⃣", 0, 0, 1), ("❤️", 0, 0, 1), ("👩🏽‍💻", 0, 0, 1), ("🇬🇪", 0, 0, 1), ("(tired)☕", 0, 0, 1),
    ("(Feeling tired) is a common experience.", 0, 0, 1),
])
def test_score(answer, form, right, leaked):
    assert score_emojibot(answer, ACCEPTABLE) == {"format": bool(form), "acceptable": bool(right), "leaked": bool(leaked)}


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=30), st.lists(st.sampled_from(list(emoji_codes())), max_size=3))
def test_score_of_any_text(text, acceptable):
    score = score_emojibot(text, acceptable)
    assert not (score["acceptable"] and not score["format"]) and not (score["format"] and score["leaked"])
    assert score_emojibot("(ok) " + text + "a", acceptable)["format"] is False


def test_every_emoji_of_unicodes_tables_leaks():
    from rich._emoji_codes import EMOJI
    assert [n for n, e in EMOJI.items() if not score_emojibot(e, [])["leaked"]] == []


# --- measures -------------------------------------------------------------------------------------------
def test_word_ngrams_and_distinct_share():
    assert word_ngrams("It's 5 o’clock, né?", 1) == [("it's",), ("5",), ("o’clock",), ("né",)]
    assert word_ngrams("a_b", 1) == [("a",), ("b",)]
    assert distinct_share(["x y", "x y", "x y", "x y"], 2) == 0.25
    assert distinct_share(["x"], 2) != distinct_share(["x"], 2)  # NaN


def test_instructgpt_mix():
    assert list(INSTRUCTGPT_MIX.values()) == [45.6, 12.4, 11.2, 8.4, 6.6, 4.2, 3.5, 3.5, 2.6, 1.9]
    assert round(sum(INSTRUCTGPT_MIX.values()), 1) == 99.9


@pytest.mark.parametrize("instruction,given_input,kind", [
    ("Translate 'family' into Italian.", "", "rewrite"), ("What is the capital of Peru?", "", "open QA"), ("Summarize the paragraph.", "It rains.", "summarisation"),
    ("Write a poem about rain", "", "generation"), ("Classify the animal as bird or fish.", "Owl", "classification"), ("Identify the verb in the sentence.", "He ran.", "extraction"),
    ("Suggest five ideas for a party.", "", "brainstorming"), ("Sort the list.", "3, 2, 1", "other"), ("Who went home?", "Ann went home and Ben stayed there.", "closed QA"),
])
def test_kind_of_use(instruction, given_input, kind): assert kind_of_use({"instruction": instruction, "input": given_input}) == kind


def test_kinds_are_those_of_the_paper(): assert {kind_of_use(r) for r in load_set("instructions")} <= set(INSTRUCTGPT_MIX)


def test_mean_hidden_does_not_depend_on_the_batch():
    import torch
    from ftcourse.models import load
    model, tokenizer = load("tiny")
    texts = ["a", "what a long message this is, really", "ok ok", "z" * 40]
    together = mean_hidden(model, tokenizer, texts, batch_size=4)
    for i, text in enumerate(texts):
        with torch.no_grad(): alone = model(torch.tensor([tokenizer(text)["input_ids"]]), output_hidden_states=True).hidden_states[-1][0].mean(0)
        torch.testing.assert_close(together[i], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mean_hidden(model, tokenizer, texts[::-1], batch_size=1), together.flip(0), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="text 1 has no tokens"): mean_hidden(model, tokenizer, ["a", ""])


def test_nearest_by_hand():
    import torch
    others = torch.tensor([[3.0, 1.0], [1.0, 3.0], [-1.0, -1.0]])  # mean (1, 1): directions (2, 0), (0, 2), (-2, -2)
    cosine, which = nearest(torch.tensor([[2.0, 1.0], [0.0, 0.0], [1.0, 9.0]]), others)
    assert which.tolist() == [0, 2, 1]
    torch.testing.assert_close(cosine, torch.ones(3))
    assert nearest(torch.tensor([[1.0, -1.0]]), others, centre=False)[0].item() == pytest.approx(2 / (2**0.5 * 10**0.5))
