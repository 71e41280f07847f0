"""Benchmarks: prompts and scores against lm-eval's own tasks, log-probabilities against plain forward passes, and what is refused."""
import json, logging, math, random, re, sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import ftcourse.evals.benchmarks as B
from ftcourse.evals.benchmarks import (TASKS, ChoiceTask, Result, WrittenTask, acc, acc_bytes, acc_norm, change, context, flexible_number, load_rows, mass, openai_task, run_task, same_number,
                                       solved_examples, strict_number)
from ftcourse.models import load

# lm-eval's file of each task
FILES = dict(mmlu="mmlu/default/mmlu_anatomy", arc="arc/arc_easy", hellaswag="hellaswag/hellaswag", winogrande="winogrande/default", truthfulqa_mc1="truthfulqa/truthfulqa_mc1", truthfulqa_mc2="truthfulqa/truthfulqa_mc2",
             gsm8k="gsm8k/gsm8k", triviaqa="triviaqa/default", **{n: f"bbh/zeroshot/{n[4:]}" for n in TASKS if n.startswith("bbh_")}, **{n: f"glue/{n}/default" for n in ("cola", "sst2", "mrpc", "qqp", "mnli", "qnli", "rte", "wnli")},
             **{n: f"super_glue/{n.removesuffix('_super')}/default" for n in ("boolq", "cb", "copa", "multirc", "rte_super", "wic", "wsc", "record")})
QUICK = ("mmlu", "winogrande", "multirc", "record", "mnli")
for _name in ("transformers.data.metrics", "transformers.data.metrics.squad_metrics"): sys.modules.setdefault(_name, ModuleType(_name))    # gone from transformers 5; lm-eval's ReCoRD still imports it


@pytest.fixture(scope="module")
def tiny(): return load("tiny")


def rows_of(name, n=6):
    rows = load_rows(name)[:n]
    return [{**r, "subject": "anatomy"} for r in rows] if name == "mmlu" else rows


def theirs(name, folder):
    "lm-eval's own task on our rows."
    from lm_eval.api.task import ConfigurableTask
    from lm_eval import tasks
    from lm_eval.tasks._yaml_loader import load_yaml
    (Path(folder)/"rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows_of(name)))
    config = load_yaml(Path(tasks.__file__).parent/f"{FILES[name]}.yaml")
    for key in ("tag", "group", "dataset_name", "training_split", "validation_split", "num_fewshot"): config.pop(key, None)
    return ConfigurableTask(config=config | dict(dataset_path="json", dataset_kwargs=dict(data_files=dict(test=str(Path(folder)/"rows.jsonl"))), test_split="test", fewshot_split="test", fewshot_config=dict(sampler="first_n")))


def requests(task, doc, n_shots, tokenizer=None):
    "The (context, continuation) pairs of lm-eval's task."
    more = {} if tokenizer is None else dict(apply_chat_template=True, fewshot_as_multiturn=True, chat_template=lambda chat, add_generation_prompt: tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=add_generation_prompt))
    found = task.construct_requests(doc, task.fewshot_context(doc, n_shots, **more), **({"apply_chat_template": True} if tokenizer else {}), metadata=("t", 0, 1))
    return [i.arguments for i in (found if isinstance(found, list) else [found])]


def ours(name, row, rows, n_shots, tokenizer=None):
    task = TASKS[name]
    shots = solved_examples(task, row, rows, n_shots)
    def front(question): return context(task, row, question, shots, tokenizer)
    if isinstance(task, ChoiceTask): return task.pairs(row, front, "" if tokenizer else task.delimiter)
    return [front(task.prompt(row))]


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FILES])
def test_prompts_are_lm_evals(name, tmp_path, tiny):
    # item 100: letters or full answers, letter by letter; item 94: shots and chat template
    task, rows = theirs(name, tmp_path), rows_of(name)
    docs = list(task.test_docs())
    for shots, tokenizer in ((0, None), (2, None), (2, tiny[1])):
        for doc, row in list(zip(docs, rows, strict=True))[:4]:
            want, got = requests(task, doc, shots, tokenizer), ours(name, row, rows, shots, tokenizer)
            if isinstance(TASKS[name], WrittenTask):
                assert [w[0] for w in want] == got and tuple(want[0][1]["until"]) == TASKS[name].until
            elif name == "multirc" and shots: continue               # its solved examples say the opposite, as its labels do
            else: assert want == got


def score_by(name, row, logps):
    task = TASKS[name]
    choices, right = task.choices(row), task.right(row)
    return {m: f(logps, choices, right) for m, f in task.measures.items()} | (task.extra(row, int(np.argmax(logps))) if task.extra else {})


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FILES if isinstance(TASKS[n], ChoiceTask) and n != "record"])
def test_scores_are_lm_evals(name, tmp_path):
    # item 92: acc, and acc_norm by characters
    task, rng = theirs(name, tmp_path), random.Random(name)
    for doc, row in zip(task.test_docs(), rows_of(name), strict=True):
        for _ in range(5):
            logps = [-20*rng.random() for _ in TASKS[name].choices(row)]
            want, got = task.process_results(doc, [(x, False) for x in logps]), score_by(name, row, logps)
            if name == "multirc": assert got["acc"] == 1 - want["acc"]       # lm-eval takes label 1 (right) for choice 1, which is "no"
            elif name == "truthfulqa_mc2": assert got["mass"] == pytest.approx(want["acc"])
            else: assert {m: got[m] for m in ("acc", "acc_norm") if m in want and m in got} == {m: want[m] for m in want if m in ("acc", "acc_norm")}


@pytest.mark.parametrize("best, wanted", [("Max Orth", (1, 1)), ("Max Planck", (0, 0.5)), ("the max orth", (1, 1)), ("Gran", (0, 0))])
def test_record_by_hand(best, wanted):
    "Max Planck shares one word of two with the answer: precision 1/2, recall 1/2."
    row = dict(passage="News.\n@highlight\nOne\n@highlight\nTwo", query="It was @placeholder.", entities=["Max Planck", "Gran", "Max Orth", "the max orth", "Gran"], answers=["Max Orth"])
    names = sorted({"Max Planck", "Gran", "Max Orth", "the max orth"})
    assert TASKS["record"].choices(row) == [f"  - It was {n}." for n in names] and TASKS["record"].prompt(row) == "News.\n\n  - One.\n  - Two.\n"
    got = score_by("record", row, [-1. if n == best else -2. for n in names])
    assert (got["acc"], got["f1"]) == wanted


def test_squads_prompt_is_lm_evals():
    from lm_eval.tasks.squadv2.task import SQuAD2
    for row in load_rows("squad")[:5]:
        assert SQuAD2.doc_to_text(None, row) == TASKS["squad"].prompt(row)
        assert SQuAD2.doc_to_target(None, row) == " " + TASKS["squad"].example(row)[1]


# --- measures ---------------------------------------------------------------------------------------------------
def test_measures_by_hand():
    # item 92
    assert [f([-4, -9], ["no", "certainly"], [0]) for f in (acc, acc_norm, acc_bytes)] == [1, 0, 0]
    assert [f([-6, -5], ["ναι", "fine"], [0]) for f in (acc, acc_norm, acc_bytes)] == [0, 0, 1]
    assert acc([-1, -1], ["a", "b"], [0]) == 1 and acc([-1, -1], ["a", "b"], [1]) == 0 and acc([-3, -1, -2], list("abc"), [0, 1]) == 1
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, right = rng.normal(size=5)*5, [0, 3]
        assert mass(x, list("abcde"), right) == pytest.approx(sum(math.exp(x[k]) for k in right)/sum(map(math.exp, x)))
    assert mass([-3000, -3000 + math.log(3)], ["a", "b"], [1]) == pytest.approx(0.75)


def test_gsm8ks_filters_are_lm_evals():
    # item 93
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter
    strict, flexible = RegexFilter(r"#### (\-?[0-9\.\,]+)", 0), RegexFilter(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1)
    rng, parts = random.Random(0), ["#### ", "18", "-7", "1,234", "$5", ".", ",", " apples ", "\n", "#### -3.", "3.50", "two", "$", "--2"]
    texts = ["", "18", "no number", "#### ", *("".join(rng.choices(parts, k=rng.randrange(1, 8))) for _ in range(300))]
    assert [strict_number(t) for t in texts] == [f[0] for f in strict.apply([[t] for t in texts], texts)]
    assert [flexible_number(t) for t in texts] == [f[0] for f in flexible.apply([[t] for t in texts], texts)]
    settings = dict(regexes_to_ignore=[",", "\\$", "(?s).*#### ", "\\.$"], ignore_case=True, ignore_punctuation=False)
    for text, row in zip(texts, load_rows("gsm8k")):
        for found in (strict_number(text), flexible_number(text), row["answer"].split()[-1] + "."):
            assert same_number(found, row["answer"]) == exact_match_hf_evaluate([found], [row["answer"]], **settings)["exact_match"]
    form = TASKS["gsm8k"].measures
    assert (form["strict"]("It is 18.", ["#### 18"]), form["flexible"]("It is 18.", ["#### 18"])) == (0, 1)


@pytest.mark.parametrize("name, wrote, strict, flexible", [("bbh_date_understanding", " (B)", 1, 1), ("bbh_date_understanding", " The answer is (B).", 0, 1), ("bbh_date_understanding", "(C) or (B)", 0, 0),
                                                          ("bbh_boolean_expressions", " True.", 1, 1), ("bbh_boolean_expressions", "not False but True", 0, 0), ("bbh_boolean_expressions", "", 0, 0)])
def test_bbh_by_hand(name, wrote, strict, flexible):
    right = ["(B)" if "date" in name else "True"]
    assert {m: f(wrote, right) for m, f in TASKS[name].measures.items()} == dict(strict=strict, flexible=flexible)


@pytest.mark.slow
def test_bbhs_space_is_where_lm_eval_differs(tmp_path):
    task = theirs("bbh_date_understanding", tmp_path)
    doc = next(iter(task.test_docs()))
    strict = [TASKS["bbh_date_understanding"].measures["strict"](space + doc["target"], [doc["target"]]) for space in ("", " ")]
    assert [task.process_results(doc, [space + doc["target"]])["exact_match"] for space in ("", " ")] == [1, 0] and strict == [1, 1]


@pytest.mark.parametrize("wrote, score", [(" Canberra", 1), ("canberra!", 1), ("the Canberra", 0), ("Sydney", 0), ("", 0)])
def test_triviaqa_by_hand(wrote, score):
    from lm_eval.api.metrics import exact_match_hf_evaluate
    got = TASKS["triviaqa"].measures["exact_match"](wrote, ["Canberra", "Canberra, Australia"])
    assert got == score == max(exact_match_hf_evaluate([wrote.strip()]*2, ["Canberra", "Canberra, Australia"], ignore_case=True, ignore_punctuation=True)["exact_match"] > 0, 0)


# --- runs -------------------------------------------------------------------------------------------------------
def plainly(model, tokenizer, context, continuation):
    n = len(tokenizer(context)["input_ids"])
    ids = torch.tensor([tokenizer(context + continuation)["input_ids"]])
    with torch.no_grad(): logp = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
    return sum(logp[i - 1, ids[0, i]].item() for i in range(n, ids.shape[1]))


def test_a_run_is_plain_forward_passes(tiny):
    rows = load_rows("mmlu_answers")[:3]
    result = run_task("mmlu_answers", *tiny, rows=rows, n_shots=1, shots=load_rows("mmlu_answers")[3:6])
    shot = load_rows("mmlu_answers")[3]
    solved = f"Question: {shot['question']}\nAnswer: {shot['choices'][shot['answer']]}\n\n"
    for row, item in zip(rows, result.items):
        front = f"The following are multiple choice questions (with answers) about astronomy.\n\n{solved}Question: {row['question']}\nAnswer:"
        assert item["logps"] == pytest.approx([plainly(*tiny, front, " " + c) for c in row["choices"]], abs=1e-3)
        assert item["answer"] == row["choices"][int(np.argmax(item["logps"]))] and item["right"] == [row["answer"]]
    assert result.scores("acc").tolist() == [float(i["pick"] in i["right"]) for i in result.items]


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in FILES if isinstance(TASKS[n], ChoiceTask)])
def test_log_probabilities_are_lm_evals_item_by_item(name, tmp_path, tiny):
    from lm_eval.models.huggingface import HFLM
    lm, task = HFLM(pretrained=tiny[0], tokenizer=tiny[1], batch_size=1), theirs(name, tmp_path)
    result = run_task(name, *tiny, rows=rows_of(name))
    for doc, item in zip(task.test_docs(), result.items, strict=True):
        found = task.construct_requests(doc, task.fewshot_context(doc, 0), metadata=("t", 0, 1))
        assert item["logps"] == pytest.approx([logp for logp, _ in lm.loglikelihood(found, disable_tqdm=True)], abs=1e-3)


def test_written_answers_are_the_models(tiny):
    from ftcourse.models import generate
    rows = load_rows("squad")[:3]
    result = run_task("squad", *tiny, rows=rows, max_new_tokens=5)
    assert [i["answer"] for i in result.items] == generate(*tiny, [TASKS["squad"].prompt(r) for r in rows], max_new_tokens=5, stop=["\n"])
    assert set(result.figures()) == {"exact_match", "f1"} and result.corpus == {}


def test_line_says_what_the_score_rests_on(tiny):
    # item 94
    plain, chat = (run_task("mmlu", *tiny, limit=3, n_shots=2, chat_template=c, name="me") for c in (False, True))
    assert "3 rows of the course's sample, not the benchmark, 2 shots, no chat template, letters scored, me in float32" in plain.line()
    assert re.search(r"chat template [0-9a-f]{8}", chat.line()) and plain.items[0]["logps"] != chat.items[0]["logps"]
    assert "full answers scored" in run_task("mmlu_answers", *tiny, limit=1).line()     # item 100
    assert "(2 rows, 0 shots" in run_task("gsm8k", *tiny, limit=2, max_new_tokens=2).line()
    assert "1 rows given" in run_task("mmlu", *tiny, rows=load_rows("mmlu")[:1]).line()


def test_corpus_measures(tiny):
    from sklearn.metrics import f1_score, matthews_corrcoef
    for name, measure, reference in (("cola", "mcc", matthews_corrcoef), ("mrpc", "f1", f1_score), ("cb", "f1", lambda y, p: f1_score(y, p, labels=[0, 1, 2], average="macro", zero_division=0))):
        result = run_task(name, *tiny)
        assert result.corpus[measure] == pytest.approx(reference([i["right"][0] for i in result.items], [i["pick"] for i in result.items]))
        assert f"{measure} {result.corpus[measure]:.3f}" in result.line()


def test_no_row_is_its_own_example():
    rows = [dict(question=f"q{i}", subject="ab"[i % 2], choices=["x", "y"], answer=0) for i in range(6)]
    for row in rows:
        found = solved_examples(TASKS["mmlu"], row, rows, 2)
        assert dict(row) not in found and {s["subject"] for s in found} == {row["subject"]} and len(found) == 2
    with pytest.raises(ValueError, match="3 solved examples are asked for, but there are only 2 other rows of subject 'a'"): solved_examples(TASKS["mmlu"], rows[0], rows, 3)


def test_a_prompt_beyond_the_context_is_cut_and_counted(tiny, caplog, monkeypatch):
    rows = [dict(question="why " * 80 + "?", subject="x", choices=["a", "b"], answer=0), dict(question="?", subject="x", choices=["a", "b"], answer=0)]
    with caplog.at_level(logging.WARNING, "ftcourse"): result = run_task("mmlu_answers", *tiny, rows=rows, max_len=100)
    assert [i["truncated"] > 0 for i in result.items] == [True, False] and "1 of 2 prompts" in caplog.text and "1 prompts cut" in result.line()
    asked, answers = [], B._answers
    monkeypatch.setattr(B, "_answers", lambda model, tokenizer, rows, *more: asked.extend(rows) or answers(model, tokenizer, rows, *more))
    written = run_task("gsm8k", *tiny, rows=[dict(question="why " * 80, answer="#### 1")], max_len=60, max_new_tokens=10)
    ids = tiny[1](TASKS["gsm8k"].prompt(dict(question="why " * 80)))["input_ids"]
    assert written.items[0]["truncated"] == len(ids) - 50 and list(asked[0]) == ids[-50:]  # the question's end stays
    with pytest.raises(ValueError, match="leave no room"): run_task("gsm8k", *tiny, limit=1, max_len=60, max_new_tokens=60)


def test_results_come_back_and_compare_row_by_row(tiny, tmp_path):
    before, after = (run_task("mmlu_answers", *tiny, limit=6, n_shots=n) for n in (0, 1))
    again = Result.load(before.save(tmp_path / "new" / "before.json"))
    assert again == before and again.line() == before.line()
    for item, score in zip(before.items, (0, 0, 0, 1, 1, 0)): item["scores"]["acc"] = score
    for item, score in zip(after.items, (1, 1, 0, 1, 0, 1)): item["scores"]["acc"] = score
    found = change(before, after, "acc")
    assert (found.better, found.worse, found.p) == (3, 1, 0.625) and found.difference == pytest.approx(2/6) and found.settings == {"n_shots": (0, 1)}    # p: 2 (4 + 1)/16
    assert found.low < found.difference < found.high
    assert before.groups("acc") == {"astronomy": (2/6, 6)}
    after.items.reverse()
    with pytest.raises(ValueError, match="different rows .6 and 6, 6 in common"): change(before, after)
    with pytest.raises(ValueError, match="no measure 'f1'"): before.scores("f1")
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="isn't a result"): Result.load(tmp_path / "other.json")


# --- rows -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", TASKS)
def test_every_task_runs_offline_on_rows_of_its_own(name):
    task, rows = TASKS[name], load_rows(name)
    assert len(rows) >= 10 and len({B._row_id(r) for r in rows}) == len(rows) and len(task.about) > 20 and len(task.source) == 3
    if isinstance(task, ChoiceTask) and task.name != "truthfulqa_mc1" and task.name != "truthfulqa_mc2": assert len({task.right(r)[0] for r in rows}) > 1
    json.dumps(rows)


@pytest.mark.parametrize("change_, says", [(lambda r: r.pop("answer"), "it lacks answer"), (lambda r: r.update(answer=4), "number .4., but there are 4 choices"), (lambda r: r.update(answer=-1), "number .-1."),
                                          (lambda r: r["choices"].__setitem__(2, " "), "choice 2 is empty"), (lambda r: r.update(answer="B"), "number .'B'."), (lambda r: r.update(choices=[]), "nothing to choose"),
                                          (lambda r: r.update(question=None), "can't be read .AttributeError")])
def test_bad_rows_are_named(change_, says, tmp_path):
    rows = json.loads(json.dumps(load_rows("mmlu_answers")[:3]))
    change_(rows[1])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for source in (rows, tmp_path / "rows.jsonl"):
        with pytest.raises(ValueError, match=f"mmlu_answers: row 1: .*{says}"): load_rows("mmlu_answers", source)


def test_other_bad_input(tiny):
    with pytest.raises(ValueError, match="There is no task 'mmul'"): run_task("mmul", *tiny)
    with pytest.raises(ValueError, match="limit=0"): run_task("mmlu", *tiny, limit=0)
    with pytest.raises(ValueError, match="there are no rows"): load_rows("mmlu", [])
    with pytest.raises(ValueError, match="at least one text"): load_rows("squad", [dict(title="", context="", question="", answers=dict(text=[]))])
    with pytest.raises(ValueError, match="answerKey|is not in list"): load_rows("arc", [dict(question="?", choices=dict(text=["a"], label=["A"]), answerKey="B")])
    with pytest.raises(ConnectionError, match="cais/mmlu's rows as a file"): load_rows("mmlu", "hub")
    with pytest.raises(ValueError, match="no place on the hub"): load_rows(openai_task("mine"), "hub")
    with pytest.raises(ValueError, match="no rows come with"): load_rows(openai_task("mine"))


# --- OpenAI Evals -----------------------------------------------------------------------------------------------
def test_openai_matches_by_hand():
    cases = [("Cold.", ["cold", "Cold"], (1, 1, 1)), ("It is cold", ["cold"], (0, 1, 1)), ("col", ["cold"], (0, 0, 1)), ("", ["cold"], (0, 0, 0)), ("The Cold!", ["cold"], (0, 0, 1))]
    for text, ideal, want in cases: assert tuple(openai_task("t", m).measures[m](text, ideal) for m in ("match", "includes", "fuzzy")) == want, text
    with pytest.raises(ValueError, match="match='exact'"): openai_task("t", "exact")


def test_openai_rows_run_with_and_without_a_template(tiny, tmp_path):
    messages = [dict(role="system", content="Be short."), dict(role="user", content="Hi?")]
    rows, task = [dict(input=messages, ideal="yes"), dict(input="2+2=", ideal=["4", "four"])], openai_task("mine", max_new_tokens=3)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert context(task, rows[0]) == "Be short.\nUser: Hi?\nAssistant:" and context(task, dict(input=messages[1:], ideal="x")) == "Hi?"
    assert context(task, rows[0], tokenizer=tiny[1]) == tiny[1].apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    for chat in (False, True): assert len(run_task(task, *tiny, rows=tmp_path / "rows.jsonl", chat_template=chat).scores()) == 2
    with pytest.raises(ValueError, match="conversations"): run_task(task, *tiny, rows=rows, n_shots=1)
    with pytest.raises(ValueError, match="it lacks ideal"): run_task(task, *tiny, rows=[dict(input="x")])
