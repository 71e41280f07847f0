"""lm-eval on our engine: every kind of task beside HFLM, settings, cuts, the cache, and what stands beside a score."""
import json, logging, subprocess, sys
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT

import ftcourse.evals.harness as H
from ftcourse.evals.harness import choice_logps, local_task, run_tasks, score_line
from ftcourse.models import generate, load

ROWS = [dict(question=f"what is {i} + {i}", choices=["one", "two dogs", f"{2*i}", "far away"], answer=i % 4, text=f"number {i} is not {2*i}. "*(1 + i), said=str(2*i)) for i in range(9)]
CHOICE = dict(output_type="multiple_choice", doc_to_text="Question: {{question}}\nAnswer:", doc_to_choice="choices", doc_to_target="answer", metric_list=[dict(metric="acc"), dict(metric="acc_norm")])
ROLL = dict(output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}", metric_list=[dict(metric="word_perplexity"), dict(metric="bits_per_byte")])
WRITE = dict(output_type="generate_until", doc_to_text="Question: {{question}}\nAnswer:", doc_to_target="{{said}}", generation_kwargs=dict(until=["zz", "hhh"], max_gen_toks=20),
             metric_list=[dict(metric="exact_match", aggregation="mean", higher_is_better=True)])


@pytest.fixture(scope="module")
def tiny(): return load("tiny")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    local_task(folder, "choice", ROWS[:-3], ROWS[-3:], **CHOICE)
    local_task(folder, "own_shots", ROWS, **CHOICE, fewshot_config={})
    local_task(folder, "roll", ROWS, **ROLL)
    local_task(folder, "write", ROWS, **WRITE)
    return folder


@pytest.fixture(scope="module")
def engines():
    from lm_eval.models.huggingface import HFLM
    model, tokenizer = load("tiny")
    with torch.no_grad():
        for p in model.parameters(): p.mul_(2)                      # livelier: it writes different texts to different prompts
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4), H.TreeLM(model, tokenizer)


def request(*args): return SimpleNamespace(args=args)


class Alone(H._Trees):
    "Without lm-eval's base class."
    cache_hook = SimpleNamespace(add_partial=lambda *args: None)


def test_imports_without_lm_eval():
    code = "import sys; sys.modules['lm_eval'] = None\nimport ftcourse.evals.harness as H\ntry: H.TreeLM\nexcept ImportError as e: print(e)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert 'pip install "ftcourse[eval]"' in done.stdout, done.stderr


def test_is_an_lm(engines):
    from lm_eval.api.model import LM
    assert isinstance(engines[1], LM) and H.TreeLM is H.TreeLM and H.TreeLM.__name__ == "TreeLM"
    with pytest.raises(AttributeError, match="no attribute 'TreeML'"): H.TreeML


@pytest.mark.parametrize("task, shots, chat", [("choice", 0, False), ("choice", 3, False), ("own_shots", 2, False), ("choice", 2, True)])
def test_choices_are_lm_evals(engines, tasks, task, shots, chat):
    # items 91, 96
    theirs, ours = (run_tasks(lm, tasks, [task], shots, apply_chat_template=chat) for lm in engines)
    for a, b in zip(choice_logps(theirs, task), choice_logps(ours, task), strict=True): assert a == pytest.approx(b, abs=1e-3)
    for metric in ("acc,none", "acc_norm,none"): assert theirs["results"][task][metric] == ours["results"][task][metric]
    assert [s["arguments"] for s in theirs["samples"][task]] == [s["arguments"] for s in ours["samples"][task]]      # the same prompts


def test_perplexity_and_text_are_lm_evals(engines, tasks):
    theirs, ours = (run_tasks(lm, tasks, ["roll", "write"]) for lm in engines)
    for metric in ("word_perplexity,none", "bits_per_byte,none"): assert theirs["results"]["roll"][metric] == pytest.approx(ours["results"]["roll"][metric], rel=1e-4)
    texts = [[s["resps"][0][0] for s in r["samples"]["write"]] for r in (theirs, ours)]
    assert texts[0] == texts[1] and len(set(texts[0])) > 1


def test_score_line_says_all_that_is_needed(engines, tasks):
    # item 94
    plain, chat = (run_tasks(engines[1], tasks, ["choice"], shots, limit=4, apply_chat_template=chat) for shots, chat in ((3, False), (0, True)))
    line = score_line(plain, "choice", "acc,none")
    assert all(part in line for part in ("choice v1.0 acc,none 0.", "4 rows", "3 shots", "no chat template", "tiny in float32", "lm-eval 0.4"))
    other = score_line(chat, "choice", "acc,none")
    assert "0 shots" in other and "no chat template" not in other and "chat template " in other
    del chat["chat_template"]
    assert "not recorded" in score_line(chat, "choice", "acc,none")


@pytest.mark.parametrize("kwargs, found", [
    (dict(until=["a", "b"], max_gen_toks=5), (["a", "b"], 5, 0)), (dict(until="a", max_new_tokens=6, do_sample=False, temperature=1.2), (["a"], 6, 0)),
    (dict(until=None, temperature=0.0, top_p=0.3), ([], 256, 0)), (dict(do_sample=True, temperature=0.5, top_p=1.0, top_k=0), ([], 256, 0.5)), (dict(do_sample=True), ([], 256, 1)),
    (dict(temperature=0.7, max_completion_tokens="9"), ([], 9, 0.7)), (dict(num_beams=1), ([], 256, 0))])
def test_settings(kwargs, found):
    before = dict(kwargs)
    assert H._settings(kwargs) == found and kwargs == before


def test_settings_are_lm_evals():
    from lm_eval.models.utils import normalize_gen_kwargs
    for kwargs in (dict(until=["x"]), dict(until="x", max_gen_toks=3), dict(until=[], max_tokens=4, temperature=0.3), dict(until=[], do_sample=False, temperature=0.3), dict(until=[], do_sample=True, temperature=0.3)):
        theirs = normalize_gen_kwargs(kwargs)
        assert H._settings(kwargs) == (theirs["until"], theirs["max_gen_toks"], theirs.get("temperature", 0.))


@pytest.mark.parametrize("kwargs", [dict(do_sample=True, temperature=0.7, top_p=0.9), dict(num_beams=4), dict(until=["a"], repetition_penalty=1.2)])
def test_settings_that_are_not_followed_are_refused(tiny, kwargs):
    with pytest.raises(ValueError, match="isn't followed here"): Alone(*tiny).generate_until([request("a", kwargs)])


def test_writes_like_generate_in_the_order_asked(tiny):
    model, tokenizer = tiny
    prompts = ["one", "two and three", "four", "five six seven eight"]
    kwargs = [dict(until=["e"], max_gen_toks=8), dict(max_gen_toks=5), dict(until=["e"], max_gen_toks=8), dict(max_gen_toks=12, do_sample=True, temperature=0.9)]
    got = Alone(*tiny, batch_size=2, seed=4).generate_until([request(p, k) for p, k in zip(prompts, kwargs)])
    alike = generate(model, tokenizer, [prompts[0], prompts[2]], 8, stop="e")
    assert got == [alike[0], generate(model, tokenizer, prompts[1], 5)[0], alike[1], generate(model, tokenizer, prompts[3], 12, 0.9, 4)[0]]


def test_long_contexts_lose_their_left_end_and_are_counted(tiny, caplog):
    model, tokenizer = tiny
    lm = Alone(*tiny, max_len=16)
    with caplog.at_level(logging.WARNING, "ftcourse"):
        (said,) = lm.generate_until([request("x"*30 + "hello there", dict(max_gen_toks=5))])
        lm.loglikelihood([request("a"*40, "b"), request("a", "b")])
    assert said == generate(model, tokenizer, "hello there", 5)[0]
    assert lm.n_truncated == 2 and "1 of 2 contexts" in caplog.text
    with pytest.raises(ValueError, match="20 tokens of an answer.* 16 in all"): lm.generate_until([request("a", dict(max_gen_toks=20))])


def test_results_go_into_lm_evals_cache(tiny):
    lm, kept = Alone(*tiny), []
    lm.cache_hook = SimpleNamespace(add_partial=lambda *args: kept.append(args))
    lm.loglikelihood([request("a", "b")])
    lm.loglikelihood_rolling([request("abc")])
    lm.generate_until([request("a", dict(max_gen_toks=2))])
    assert [(kind, args) for kind, args, _ in kept] == [("loglikelihood", ("a", "b")), ("loglikelihood_rolling", ("abc",)), ("generate_until", ("a", dict(max_gen_toks=2)))]
    assert isinstance(kept[0][2], tuple) and isinstance(kept[1][2], float) and isinstance(kept[2][2], str)


def test_a_task_file_is_complete(tmp_path):
    path = local_task(tmp_path/"new", "mine", [dict(a="ა")], doc_to_text="{{a}}")
    config = json.loads(path.read_text(encoding="utf-8"))
    assert config["task"] == "mine" and config["doc_to_text"] == "{{a}}" and (tmp_path/"new"/"mine.jsonl").read_text(encoding="utf-8") == '{"a": "ა"}\n'
    with pytest.raises(ValueError, match="mine has no rows"): local_task(tmp_path, "mine", [])


def test_opens_a_model_by_name_and_wants_a_tokenizer(tiny):
    lm = Alone("tiny")
    assert lm.max_length == 8192 and lm.get_model_info()["model_dtype"] == "torch.float32" and lm.get_model_info()["model_name"] == "tiny"
    with pytest.raises(ValueError, match="tokenizer"): Alone(tiny[0])
    assert torch.equal(lm.model.lm_head.weight, tiny[0].lm_head.weight)
