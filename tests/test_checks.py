"""Checks of data sets: every error counted, repeats and leaks found as brute force finds them, tokens and bill by hand."""
import csv, gzip, json, math, random, string, subprocess, sys, time

import pytest
from hypothesis import given, settings, strategies as st

from ftcourse.data import checks as C
from ftcourse.tokens import apply_template, tiny_tokenizer

USER, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
GOOD = {"messages": [USER, REPLY]}
TINY = tiny_tokenizer()
LOSSY = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
                     lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(["messages", "role", "content", "text", "prompt", "completion", "chosen",
                         "rejected", "completions", "function_call", "instruction", "output", "conversations", "label", "x"]), x, max_size=4), max_leaves=12)


# --- the seven format errors ----------------------------------------------------------------------------
FAULTY = {
    "data_type": ["a row of text", 3, None, [USER, REPLY], {"messages": [USER, REPLY, "text"]}],
    "missing_messages_list": [{}, {"messages": []}, {"messages": None}, {"messages": "text"}, {"message": [USER]}, {"messages": {}}],
    "message_missing_key": [{"messages": [{"content": "Hi"}, REPLY]}, {"messages": [{"role": "user"}, REPLY]}],
    "message_unrecognized_key": [{"messages": [USER, {**REPLY, "mood": 1}]}],
    "unrecognized_role": [{"messages": [{"role": "human", "content": "Hi"}, REPLY]}, {"messages": [{"role": None, "content": "Hi"}, REPLY]},
                          {"messages": [{"role": ["user"], "content": "Hi"}, REPLY]}],
    "missing_content": [{"messages": [USER, {"role": "assistant", "content": c}]} for c in ("", None, 3, [], ["Hi"], {"text": "Hi"}, False)],
    "example_missing_assistant_message": [{"messages": [USER]}, {"messages": [{"role": "system", "content": "Be kind"}, USER]}],
}


@pytest.mark.parametrize("name", C.FORMAT_ERRORS)
def test_each_error_is_counted(name):
    counts = C.format_checks([GOOD, *FAULTY[name]])
    assert counts[name] == len(FAULTY[name])
    assert C.check([GOOD, *FAULTY[name]]).format_errors[name] == len(FAULTY[name])
    assert not C.check([GOOD, *FAULTY[name]]).ok


def test_the_names_are_the_published_ones():
    assert set(C.format_checks([])) == set(FAULTY) and set(C.format_checks([]).values()) == {0}


@pytest.mark.parametrize("message", [
    {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
    {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": "{}"}},
    {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
    {"role": "function", "name": "f", "content": "3"}, {"role": "user", "name": "Nino", "content": "გამარჯობა"}, {"role": "assistant", "content": "x", "weight": 0}])
def test_legal_messages(message): assert C.message_faults(message) == []


def test_several_faults_in_a_row_are_all_counted():
    counts = C.format_checks([{"messages": [{"content": 3, "mood": 1}, {"role": "robot", "content": "beep"}, "text"]}])
    assert counts == {"data_type": 1, "missing_messages_list": 0, "message_missing_key": 1, "message_unrecognized_key": 1, "unrecognized_role": 2,
                      "missing_content": 1, "example_missing_assistant_message": 1}


@settings(max_examples=200, deadline=None)
@given(st.lists(LOSSY | st.just(GOOD), max_size=5))
def test_no_data_crashes_a_check(rows):
    report = C.check(rows, TINY, others={"test": rows})
    json.dumps(report.as_dict())
    assert report.n_rows == len(rows) and report.ok == (not report.errors)


# --- files ----------------------------------------------------------------------------------------------
def _write(path, rows, opener=open):
    with opener(path, "wt") as f: f.writelines(json.dumps(r) + "\n" for r in rows)
    return path


def test_files(tmp_path):
    good = [{"messages": [{"role": "user", "content": f"Question {w}"}, {"role": "assistant", "content": f"Answer {w}"}]} for w in string.ascii_letters]
    assert C.check(_write(tmp_path / "a.jsonl", good)).ok
    assert C.check(str(_write(tmp_path / "a.jsonl.gz", good, gzip.open))).ok
    with open(tmp_path / "a.csv", "w", newline="") as f: csv.writer(f).writerows([["prompt", "completion"], *([f"Q {w}", f"A {w}"] for w in "abcdefghijkl")])
    report = C.check(tmp_path / "a.csv")
    assert report.ok and report.kinds == {"prompt_completion": 12}


def test_broken_files_are_findings(tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text(json.dumps(GOOD) + "\n3\n" + '{"messages": [\n' + json.dumps({"messages": [USER]}) + "\n")
    report = C.check(path)
    assert not report.ok and "unreadable" in report.as_dict()["errors"]
    assert report.format_errors["data_type"] == 1 and report.format_errors["example_missing_assistant_message"] == 1  # the rest is checked all the same
    for name, data in (("empty.jsonl", b""), ("binary.jsonl", bytes(range(256)) * 9), ("x.xlsx", b"PK\x03\x04"), ("cut.json", b'[{"messages": [')):
        (tmp_path / name).write_bytes(data)
        assert C.check(tmp_path / name).errors[0].name == "unreadable"
    assert C.check(tmp_path / "none.jsonl").errors[0].name == "unreadable"
    assert C.basic_checks(path)["readable"] is False and C.basic_checks([GOOD])["first"] == GOOD


def test_rows_are_counted_from_one_like_lines(tmp_path):
    report = C.check(_write(tmp_path / "a.jsonl", [GOOD, {"messages": [USER]}]))
    assert [f.rows for f in report.errors if f.name == "example_missing_assistant_message"] == [(2,)]


def test_empty_list(): assert C.check([]).as_dict()["warnings"]["few_rows"] == 1


# --- repeats --------------------------------------------------------------------------------------------
def test_duplicates():
    rows = [{"prompt": "Hi  there", "completion": "yes"}, {"prompt": "hi there", "completion": "Yes"}, {"prompt": "hi there", "completion": "no"}, {}, 3]
    assert C.duplicates(rows) == [[0, 1]] and C.duplicates(rows, "prompt") == [[0, 1, 2]]
    errors = C.check(rows[:3]).as_dict()["warnings"]
    assert errors["duplicates"] == 1 and errors["repeated_prompts"] == 1


def _random_rows(rng, n, words=30, length=(1, 14)):
    vocab = [f"w{i}" for i in range(words)]
    rows = [" ".join(rng.choices(vocab, weights=range(words, 0, -1), k=rng.randint(*length))) for _ in range(n)]
    for _ in range(n // 3):  # changed copies
        text = rng.choice(rows).split()
        text[rng.randrange(len(text))] = rng.choice(vocab)
        rows.append(" ".join(text))
    return [{"prompt": t, "completion": ""} for t in rows]


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_near_duplicates_are_those_of_brute_force(threshold, seed):
    rows = _random_rows(random.Random(seed), 90)
    groups = C.near_duplicates(rows, threshold)
    sets = [C.shingles(r["prompt"]) for r in rows]
    order = sorted(range(len(sets)), key=lambda i: (len(sets[i]), i))
    near = {(i, j) for n, i in enumerate(order) for j in order[n+1:] if len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= threshold - 1e-9}
    assert sum(len(g) - 1 for g in groups) == len({j for _, j in near})
    member = {i: g for g in groups for i in g}
    for g in groups:  # a group is held together by pairs that are similar
        assert all(any((i, j) in near or (j, i) in near for j in g if j != i) for i in g)
    assert all(j in member for _, j in near)


@pytest.mark.parametrize("threshold", [0.4, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_leaks_are_those_of_brute_force(threshold, seed):
    rng = random.Random(seed)
    rows = _random_rows(rng, 90)
    rng.shuffle(rows)
    train, test = rows[:80], rows[80:]
    a, b = ([C.shingles(r["prompt"]) for r in part] for part in (train, test))
    expected = {}
    for i, x in enumerate(b):
        best = max(len(x & y) / len(x | y) for y in a)
        if best >= threshold - 1e-9: expected[i] = best
    found = C.leakage({"train": train, "test": test}, threshold)["test"]
    assert {i: s for i, _, s in found} == pytest.approx(expected)
    for i, j, s in found: assert len(b[i] & a[j]) / len(b[i] | a[j]) == pytest.approx(s)


def test_leaks_are_findings():
    train = [{"prompt": f"What is the colour of the {w}, my old friend?", "completion": w} for w in ("sky", "sea", "sun")]
    test = [{"message": "WHAT is the colour of the sea, my old friend?"}, {"prompt": "what is the colour of a sun, my old friend"}, {"prompt": "Where are you?"}]
    report = C.check(train, others={"test": test}, near=0.6).as_dict()
    assert report["errors"] == {"leak": 1} and report["warnings"]["near_leak"] == 1
    assert C.check(train, others={"test": [{"x": 1}]}).errors[0].name == "no_prompts"


def test_the_system_message_does_not_make_rows_alike():
    system = {"role": "system", "content": "You are a very helpful assistant who always answers in one short sentence."}
    rows = [{"messages": [system, {"role": "user", "content": w}, {"role": "assistant", "content": w * 2}]} for w in ("ab", "cd", "ef")]
    assert C.near_duplicates(rows) == []


@pytest.mark.parametrize("text", ["疲れた、今日はもう帰りたい", "เหนื่อยมากวันนี้", "ძალიან დავიღალე დღეს", "😀 🎉", "!!!"])
def test_other_scripts(text):
    rows = [{"prompt": text, "completion": "x"}, {"prompt": "quite another thing", "completion": "y"}, {"prompt": text, "completion": "x"}]
    assert C.near_duplicates(rows) == [(0, 2)]
    assert C.leakage({"a": rows, "b": rows[:1]})["b"] == [(0, 0, 1.0)]


def test_threshold_is_checked():
    for bad in (0, -1, 1.1):
        with pytest.raises(ValueError, match="threshold"): C.near_duplicates([GOOD], bad)


@pytest.mark.slow
def test_a_hundred_thousand_rows():
    rng = random.Random(0)
    vocab = [f"w{i}" for i in range(30_000)]
    weights = [1 / (i + 1) for i in range(30_000)]
    words = iter(rng.choices(vocab, weights, k=6_000_000))
    rows = [{"prompt": " ".join(next(words) for _ in range(30)), "completion": " ".join(next(words) for _ in range(30))} for _ in range(90_000)]
    rows += [{"prompt": r["prompt"] + " again", "completion": r["completion"]} for r in rows[:5000]]
    rows += [{"prompt": "One text that stands in many rows.", "completion": "Yes."}] * 5000
    started = time.time()
    assert sum(len(g) - 1 for g in C.near_duplicates(rows)) == 5000 + 4999
    assert time.time() - started < 300


# --- other findings -------------------------------------------------------------------------------------
@pytest.mark.parametrize("row", [{"prompt": "Hi", "completion": " "}, {"messages": [USER, {"role": "assistant", "content": "\n"}]},
                                 {"prompt": "Hi", "chosen": "yes", "rejected": ""}, {"instruction": "Hi", "input": "", "output": " "}])
def test_empty_answers(row):
    assert C.check([row]).as_dict()["errors"]["empty_answer"] == 1
    assert C.check([row], TINY).as_dict()["errors"]["empty_answer"] == 1


def test_identical_pairs_and_mixed_formats():
    report = C.check([{"prompt": "Hi", "chosen": "a", "rejected": "a "}, GOOD]).as_dict()
    assert report["warnings"]["identical_pair"] == 1 and report["warnings"]["mixed_formats"] == 2


def test_broken_rows_and_calls_are_not_repeats():
    call = lambda name: {"messages": [USER, {"role": "assistant", "content": None, "function_call": {"name": name, "arguments": "{}"}}]}
    report = C.check([{"messages": [USER]}, {"messages": [USER, "text"]}, call("f"), call("g"), call("f")]).as_dict()
    assert report["warnings"]["duplicates"] == 1 and "empty_answer" not in report["errors"]


def test_no_end_token():
    rows = [{"text": "Q: Hi\nA: Hello"}, {"text": "Q: Hi\nA: Hello<|im_end|>\n"}, {"text": "Q: Hi\nA: Hello</s>"}]
    assert C.token_report(rows).no_end == (0,)
    assert C.check(rows, TINY).as_dict()["warnings"]["no_end_token"] == 1
    never = tiny_tokenizer()
    never.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    assert not C.template_ends(never) and C.template_ends(TINY)
    assert C.token_report([GOOD], never).no_end == (0,)


# --- tokens and the bill --------------------------------------------------------------------------------
def test_tokens_by_hand():
    rows = [GOOD, {"prompt": "ab", "completion": "cde"}, {"prompt": "ab", "chosen": "c", "rejected": "cdef"}, {"text": "abc"}]
    report = C.token_report(rows, TINY, limit=5)
    chat = len("user") + 4 + 2 + len("assistant") + 4 + 5 - 1  # four more for each turn: two marks, two line breaks; the last isn't trained on
    assert report.lengths == (chat, 2 + 3 + 1, 2 + 4 + 1, 3)
    assert report.learnt == (5 + 1, 3 + 1, 1 + 1 + 4 + 1, 3)
    assert chat == len(apply_template(TINY, GOOD["messages"])) - 1
    assert report.too_long == [0, 1, 2] and report.n_cut == (chat - 5) + 1 + 2
    edges, counts = report.histogram(4)
    assert sum(counts) == 4 and edges == [0, 7, 14, 21, 28] and counts == [2, 1, 0, 1]  # 3, 6 | 7 | - | 27
    assert C.check(rows, TINY, limit=5).as_dict()["warnings"]["too_long"] == 3


def test_a_row_that_the_template_refuses_is_a_finding():
    strict = tiny_tokenizer()
    strict.chat_template = "{{ raise_exception('only users here') }}"
    errors = C.check([GOOD], strict).as_dict()["errors"]
    assert errors == {"cannot_encode": 1}


def test_estimate_without_tokenizer():
    report = C.token_report([{"prompt": "a" * 40, "completion": "é" * 10}])
    assert report.lengths == (10 + 5,) and report.learnt == (5,) and not report.exact


@pytest.mark.parametrize("n, epochs", [(1, 25), (3, 25), (4, 25), (5, 20), (30, 4), (33, 4), (34, 3), (50, 3), (8333, 3), (8334, 2), (12_500, 2), (12_501, 1), (25_000, 1), (30_000, 1)])
def test_epochs(n, epochs): assert C.epochs_for(n) == epochs


@pytest.mark.parametrize("n", [*range(4, 400), *range(400, 25_001, 97), 25_000])
def test_examples_seen_stay_in_range(n): assert 100 <= n * C.epochs_for(n) <= 25_000 and 1 <= C.epochs_for(n) <= 25


def test_out_of_range_is_said():
    assert "100" in C.epochs_and_cost([1] * 3)["notes"][0] and "25,000" in C.epochs_and_cost([1] * 30_000)["notes"][0]
    with pytest.raises(ValueError, match="n_rows=0"): C.epochs_for(0)


def test_bill_by_hand():
    lengths = [5000, 1000, 1000]
    full, cut = (C.epochs_and_cost(lengths, n_epochs=2, price=3.0, billed=b) for b in ("full", "cut"))
    assert (full["tokens_billed"], full["cost"], full["n_cut"]) == (14_000, pytest.approx(0.042), 904)
    assert (cut["tokens_billed"], cut["cost"]) == (12_192, pytest.approx(0.036576))
    assert C.epochs_and_cost([100] * 50)["notes"] == []  # 5,000 in all, but no row is longer than 4,096
    for bad in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match="price"): C.epochs_and_cost([1], price=bad)
    with pytest.raises(ValueError, match="billed"): C.epochs_and_cost([1], billed="half")


def test_prompts_are_billed_too():
    bill = C.check([{"prompt": "a" * 90, "completion": "b" * 9}] * 50, TINY, price=1.0, n_epochs=1).bill
    assert bill["tokens_billed"] == 50 * 100


# --- the report -----------------------------------------------------------------------------------------
def test_report_prints_markup_as_text(capsys):
    C.check([{"messages": [USER, {"role": "[bold]robot", "content": "[/x]"}]}], price=2.0).print()
    said = capsys.readouterr().out
    assert "unrecognized_role" in said and "don't train" in said and "cost" not in said.split("error")[0]


def test_report_is_json(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"Q {i}"}, {"role": "assistant", "content": f"A {i*i}"}]} for i in range(60)]
    report = json.loads(json.dumps(C.check(rows, TINY, price=8.0).as_dict()))
    assert report["ok"] and report["errors"] == {} and report["bill"]["n_epochs"] == 3 and report["tokens"]["exact"]
    assert set(report["format_errors"]) == set(C.FORMAT_ERRORS)


def test_streams_and_datasets():
    import datasets
    assert C.check(datasets.Dataset.from_list([GOOD] * 3)).n_rows == 3
    assert C.check(iter([GOOD, GOOD])).n_rows == 2


def test_import_is_light():
    code = "import sys, ftcourse.data.checks as C; C.check([{'prompt': 'a', 'completion': 'b'}]); print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
