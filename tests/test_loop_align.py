"""Rounds of generating, judging and retraining: choosing by hand, the best of n by enumeration, the loop on the tiny model, and what a crash leaves."""
import itertools, json, math, subprocess, sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import ftcourse.align.loop as L
from ftcourse.align.loop import LoopSettings, best_of_n_policy, choose_best, choose_pairs, diversity, first_of_each, improve, plot_rounds, reply_entropy
from ftcourse.align.reward import RewardModel, add_reward_head
from ftcourse.data.batches import Tree
from ftcourse.models import load
from ftcourse.tune.lora import add_lora, lora_parameters, lora_state
from ftcourse.tune.sft import finetune
from ftcourse.tune.trees import batch_trees, reply_logps

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = [f"number {i} is" for i in range(6)]
SHORT = dict(rounds=2, n_samples=4, max_new_tokens=8, lr=5e-3, batch_size=4, progress=False)
PAIRS = {**SHORT, "method": "dpo", "lr": 2e-3}


def brief_model():
    "The tiny model with more to say than it comes with, and every second byte beyond the plain ones an end."
    model, tokenizer = load("tiny")
    model.get_input_embeddings().weight.data *= 3
    model.generation_config.eos_token_id = [2, *range(131, 259, 2)]
    return model, tokenizer

def plain(prompts, replies): return [sum(c.isascii() and c.isalpha() for c in r)/max(1, len(r)) for r in replies]

def state(run): return {k: v.clone() for k, v in lora_state(run.bot.model).items()}

def same(a, b): return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)

def randn(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def tree(*replies): return Tree(replies[0].prompt_ids, tuple(r.ids for r in replies), tuple((1,)*len(r.ids) for r in replies))

@pytest.fixture
def trained(monkeypatch):
    "The trees of every round, as the trainer got them."
    seen, own = [], L.TreeTrainer
    monkeypatch.setattr(L, "TreeTrainer", lambda model, goal, trees, *rest: seen.append(trees) or own(model, goal, trees, *rest))
    return seen


# --- choosing --------------------------------------------------------------------------------------------------
def test_best_by_hand():
    assert choose_best(["a", "b", "c", "d"], [1, 4, 4, -2]) == [1]
    assert choose_best(["a", "b"], torch.tensor([.2, .3])) == [1]
    assert choose_best(["a", "b"], [.2, .3], at_least=.3) == [1] and choose_best(["a", "b"], [.2, .3], at_least=.31) == [] and choose_best([], []) == []


def test_pairs_by_hand():
    said, scores = ["x", "y", "x", "z", "w"], [2., 5., 9., 3., 2.]                      # the second x has another score: the first one's counts
    assert first_of_each(said) == [0, 1, 3, 4] and first_of_each([]) == [] and first_of_each(["a"]*3) == [0]
    assert choose_pairs(said, scores)[0][0] == 1 and scores[choose_pairs(said, scores)[0][1]] == 2
    assert set(choose_pairs(said, scores, "all")) == {(1, 0), (1, 3), (1, 4), (3, 0), (3, 4)}      # x and w tie
    assert set(choose_pairs(said, scores, "all", gap=2)) == {(1, 3), (1, 0), (1, 4)}
    assert choose_pairs(said, scores, gap=3.5) == [] and choose_pairs(["a", "b"], [1, 1], "all") == []


@pytest.mark.parametrize("seed", range(5))
def test_pairs_are_those_of_a_plain_search(seed):
    gen = torch.Generator().manual_seed(seed)
    texts, scores = [torch.randint(0, k, (7,), generator=gen).tolist() for k in (5, 4)]
    first = [i for i in range(7) if texts[i] not in texts[:i]]
    wanted = {(i, j) for i in first for j in first if scores[i] - scores[j] >= 2}
    assert set(choose_pairs(texts, scores, "all", 2)) == wanted
    (best, worst), = choose_pairs(texts, scores) or [(first[0], first[0])]
    assert scores[best] == max(scores[i] for i in first) and scores[worst] == min(scores[i] for i in first)


@pytest.mark.parametrize("call, said", [
    (lambda: choose_best(["a"], [math.nan]), "the score of reply 0, 'a', is nan"), (lambda: choose_pairs(["a", "b"], [1, math.inf]), "reply 1, 'b', is inf"),
    (lambda: choose_best(["a", "b"], [1]), "1 scores for 2 replies"), (lambda: choose_pairs([], [], "some"), "pairs='some'"), (lambda: choose_pairs([], [], gap=-1), "gap=-1"),
    (lambda: best_of_n_policy(torch.ones(2), torch.ones(3), 2), "a score for each"), (lambda: best_of_n_policy(torch.ones(2), torch.ones(2), 0), "n=0"), (lambda: reply_entropy([]), "no replies")])
def test_bad_input(call, said):
    with pytest.raises(ValueError, match=said): call()


# --- the best of n ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("ties", [False, True])
def test_best_of_n_is_what_choosing_gives(n, ties):
    probs, scores = randn(5, seed=1).softmax(0), randn(5, seed=2)
    if ties: scores = scores.round()
    listed = torch.zeros(5, dtype=torch.float64)
    for draw in itertools.product(range(5), repeat=n): listed[draw[choose_best(draw, scores[list(draw)])[0]]] += probs[list(draw)].prod()
    assert_close(best_of_n_policy(probs, scores, n), listed)


def test_best_of_n_by_hand_and_over_rounds():
    probs, scores = torch.tensor([.2, .5, .3, 0.], dtype=torch.float64), torch.tensor([3., 1., 2., 9.])
    assert_close(best_of_n_policy(probs, scores, 2), torch.tensor([1 - .8**2, .5**2, .8**2 - .5**2, 0.], dtype=torch.float64))   # what is never drawn is never chosen
    twice = best_of_n_policy(best_of_n_policy(probs, scores, 3), scores, 2)
    assert_close(twice, best_of_n_policy(probs, scores, 6))
    assert_close(best_of_n_policy(probs, torch.zeros(4), 7), probs)                                                             # no choice between equals


@pytest.mark.parametrize("n", [2, 5, 64])
def test_best_of_n_is_no_farther_than_the_bound(n):
    bound = math.log(n) - (n - 1)/n
    for seed in range(5):
        p, s = randn(9, seed=seed).softmax(0), randn(9, seed=seed + 50)
        for scores in (s, s.round()):
            q = best_of_n_policy(p, scores, n)
            assert 0 <= torch.special.xlogy(q, q/p).sum() < bound
    even = torch.full((20_000,), 1/20_000, dtype=torch.float64)
    q = best_of_n_policy(even, torch.arange(20_000), n)
    assert_close(torch.special.xlogy(q, q/even).sum().item(), bound, atol=1e-3, rtol=0)


# --- variety ---------------------------------------------------------------------------------------------------
def test_diversity_by_hand():
    got = diversity([["a b", "a b", "c", ""], ["a b", "d e f"]])
    assert got["unique"] == (3/4 + 2/2)/2
    assert got["entropy"] == pytest.approx(3/6*math.log(2) + 3/6*math.log(6))
    assert got["distinct_1"] == 6/10 and got["distinct_2"] == 3/5                        # a b c d e f of ten words; ab, de, ef of five pairs
    assert diversity([["one", "one"]]) == {"unique": .5, "entropy": 0., "distinct_1": .5}
    assert reply_entropy(["x"]*5) == 0 and reply_entropy(list("abcdefgh")) == pytest.approx(math.log(8))


# --- settings --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("wrong, said", [
    (dict(rounds=0), "rounds=0"), (dict(n_samples=1), "n_samples=1"), (dict(n_prompts=0), "n_prompts=0"), (dict(max_new_tokens=2.5), "max_new_tokens=2.5"), (dict(method="kto"), "doesn't learn from pairs"),
    (dict(method="dpp"), "dpp"), (dict(parameters={"beta": .1}), "parameters says nothing to method='sft'"), (dict(gap=1.), "gap says nothing"), (dict(method="dpo", at_least=1.), "at_least says nothing"),
    (dict(method="dpo", parameters={"betta": .1}), "no parameter betta"), (dict(lr=0.), "lr=0.0"), (dict(batch_size=0), "batch_size=0"), (dict(pairs="some"), "pairs='some'")])
def test_settings_that_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said): LoopSettings(**wrong)


def test_usual_rates():
    assert LoopSettings().run(0, False).lr == 1e-3 and LoopSettings(method="dpo").run(0, False).lr == 2e-4 and LoopSettings(method="dpo", lr=.5).run(3, False).lr == .5
    with pytest.raises(TypeError, match="n_sample"): improve("tiny", PROMPTS, plain, n_sample=3)


@pytest.mark.parametrize("wrong, said", [
    (dict(prompts=[]), "must be a list"), (dict(prompts="one text"), "must be a list"), (dict(n_prompts=7), "n_prompts=7"), (dict(lora="full"), "lora='full'"), (dict(prompts=["a", "b"*9000]), "prompt 1 has 900"),
    (dict(judge=lambda p, r: [1.]), "the judge: 1 scores for 24"), (dict(judge=lambda p, r: [math.nan]*len(r)), "the judge: the score of reply 0"), (dict(gold=lambda p, r: [math.inf]*len(r)), "the gold score: the score of reply 0")])
def test_what_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said): improve(**{**dict(model=brief_model(), prompts=PROMPTS, judge=plain), **SHORT, **wrong})


def test_one_process_only(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process"): improve("tiny", PROMPTS, plain)


# --- a round ---------------------------------------------------------------------------------------------------
def test_sft_learns_the_best_as_it_was_drawn(trained):
    run = improve(brief_model(), PROMPTS, plain, **SHORT)
    for trees, replies in zip(trained, run.replies):
        best = {}
        for r in replies:
            if r.ended and (r.prompt not in best or r.score > best[r.prompt].score): best[r.prompt] = r
        assert [(t.row, t.prompt_ids, t.replies, t.masks) for t in trees] == [(i, r.prompt_ids, (r.ids,), ((1,)*len(r.ids),)) for i, r in best.items()]
    assert len(trained) == 2 and [h["rows"] for h in run.history[:-1]] == [len(t) for t in trained]
    assert not all(r.ended for replies in run.replies for r in replies)                  # something was cut, and nothing learnt from it


def test_objectives_learn_pairs_of_better_and_worse(trained):
    run = improve(brief_model(), PROMPTS, plain, **PAIRS, pairs="all", gap=.3)
    for trees, replies in zip(trained, run.replies):
        scores = {}
        for r in replies:
            if r.ended: scores.setdefault((r.prompt, r.text), (r.ids, r.score))
        wanted = {(i, a, b) for (i, _), (a, x) in scores.items() for (j, _), (b, y) in scores.items() if i == j and x - y >= .3}
        assert {(t.row, *t.replies) for t in trees} == wanted and len(trees) == len(wanted) > 0
        assert all(t.scores == (1., 0.) and len(t.ref_logps) == 2 for t in trees)


def test_the_bar(trained):
    run = improve(brief_model(), PROMPTS, plain, at_least=1., **SHORT)
    by_ids = {(r.prompt, r.ids): r.score for replies in run.replies for r in replies}
    assert trained and all(by_ids[t.row, t.replies[0]] == 1 for trees in trained for t in trees)


def test_round_after_round_the_judge_is_pleased_more():
    letters, (model, tokenizer) = tuple("abcdef"), load("tiny")
    model.get_input_embeddings().weight.data *= 5
    finetune((model, tokenizer), [{"prompt": f"number {i} is", "completion": letters[7*i % 6]} for i in range(96)], method="full", batch_size=16, max_steps=60, lr=3e-3, progress=False)
    late = lambda prompts, replies: [letters.index(r) if r in letters else -1 for r in replies]
    run = improve((model, tokenizer), [f"number {i} is" for i in range(24)], late, gold=lambda p, r: [len(x) for x in r], max_new_tokens=4, n_epochs=4, lr=5e-3, progress=False)
    first, *_, last = run.history
    assert last["score"] > first["score"] + .5 and last["entropy"] < first["entropy"] - .3 and first["kl"] == 0 and last["kl"] > .4 and [h["round"] for h in run.history] == [0, 1, 2, 3]
    assert first["gold"] == sum(len(r.text) for r in run.replies[0])/len(run.replies[0]) and first["best"] > first["score"]
    assert all(math.isfinite(v) for h in run.history for v in h.values())


def test_dpo_raises_the_better_of_each_pair(trained):
    run = improve(brief_model(), PROMPTS, plain, **{**PAIRS, "rounds": 1, "n_epochs": 4})
    (trees,), start = trained, brief_model()[0]
    with torch.no_grad(): now, before = (reply_logps(m, batch_trees(trees, m))[0].sum(1).view(-1, 2) for m in (run.bot.model, start))
    assert_close(before, torch.tensor([t.ref_logps for t in trees]), atol=1e-3, rtol=1e-4)
    better = now - before
    assert (better[:, 0] > better[:, 1]).float().mean() > .7 and (better[:, 0] - better[:, 1]).mean() > .1


def test_kl_is_the_plain_computation(tmp_path):
    run = improve(brief_model(), PROMPTS, plain, tmp_path, **SHORT)
    ratios, start = [], brief_model()[0]
    for r in run.replies[2]:
        batch = batch_trees([tree(r)], start)
        with torch.no_grad(): ratios.append((reply_logps(run.bot.model, batch)[0] - reply_logps(start, batch)[0]).sum())
    ratios = torch.stack(ratios)
    assert run.history[2]["kl"] == pytest.approx(ratios.mean().item(), abs=1e-4) and run.history[2]["kl_se"] == pytest.approx((ratios.std()/math.sqrt(24)).item(), abs=1e-4)
    assert run.history[2]["length"] == sum(len(r.ids) for r in run.replies[2])/24 and run.history[2]["ended"] == sum(r.ended for r in run.replies[2])/24


def test_an_adapter_that_is_there_is_the_start():
    model, tokenizer = brief_model()
    add_lora(model, 2)
    gen = torch.Generator().manual_seed(0)
    for p in lora_parameters(model): p.data += .05*torch.randn(p.shape, generator=gen)
    base = {n: p.clone() for n, p in model.named_parameters() if not n.endswith((".A", ".B"))}
    start = {k: v.clone() for k, v in lora_state(model).items()}
    run = improve((model, tokenizer), PROMPTS, plain, **SHORT)
    assert run.history[0]["kl"] == 0 and run.history[1]["kl"] != 0 and not same(start, lora_state(model))
    assert all(p.equal(base[n]) for n, p in model.named_parameters() if n in base)


@pytest.mark.parametrize("restart", [False, True])
def test_which_reference_a_round_has(restart, monkeypatch):
    asked, own = [], L.with_reference
    monkeypatch.setattr(L, "with_reference", lambda model, *rest: asked.append({k: v.clone() for k, v in lora_state(model).items()}) or own(model, *rest))
    run = improve(brief_model(), PROMPTS, plain, restart=restart, **PAIRS)
    assert len(asked) == 2 and same(asked[0], asked[1]) == restart and not same(asked[1], state(run))


def test_old_rows_are_mixed_in(trained, capsys):
    rows = [{"prompt": f"old {i}", "completion": " row"} for i in range(9)]
    improve(brief_model(), PROMPTS, plain, replay=rows, replay_share=.5, **SHORT)
    pairs = [{"prompt": f"old {i}", "chosen": " row", "rejected": " line"} for i in range(30)]
    improve(brief_model(), PROMPTS, plain, replay=pairs, replay_share=.5, **PAIRS)
    assert [len(t) for t in trained][:2] == [12, 12] and "6 new rows and 6 of 9 old ones" in capsys.readouterr().out
    assert all(sum(len(t.ref_logps) == 2 for t in trees) == len(trees) and len(trees) % 2 == 0 for trees in trained[2:])
    with pytest.raises(ValueError, match="Lower the share"): improve(brief_model(), PROMPTS, plain, replay=rows[:1], replay_share=.5, **SHORT)


def test_nothing_to_learn_from_is_said_and_changes_nothing(capsys):
    run = improve(brief_model(), PROMPTS, lambda p, r: [1.]*len(r), **PAIRS)
    assert "round 1: of 24 replies none" in capsys.readouterr().out and [h["kl"] for h in run.history] == [0, 0, 0] and [h["rows"] for h in run.history] == [0, 0, 0]


def test_prompts_and_draws_of_each_round():
    asked = []
    run = improve(brief_model(), PROMPTS, lambda p, r: asked.append(p) or plain(p, r), n_prompts=3, **SHORT)
    laps = [list(dict.fromkeys(r.prompt for r in replies)) for replies in run.replies]
    assert sorted(laps[0] + laps[1]) == list(range(6)) and all(p == [PROMPTS[i] for i in lap for _ in range(4)] for p, lap in zip(asked, laps))
    whole = improve(brief_model(), ["same"]*3, lambda p, r: [1.]*len(r), **PAIRS)                # the policy stays, its draws don't
    assert len({tuple(r.text for r in replies) for replies in whole.replies}) == 3 and len({r.ids for r in whole.replies[0]}) > 8
    again, other = (improve(brief_model(), PROMPTS, plain, seed=seed, **SHORT) for seed in (0, 1))
    assert again.history == improve(brief_model(), PROMPTS, plain, **SHORT).history != other.history


def test_a_reward_model_judges():
    model, tokenizer = load("tiny")
    judge = RewardModel(add_reward_head(model), tokenizer)
    chats = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": p}] for p in PROMPTS]
    run = improve(brief_model(), chats, judge, **{**SHORT, "rounds": 1})
    assert [r.score for r in run.replies[0]] == pytest.approx(judge.scores([chats[r.prompt] for r in run.replies[0]], [r.text for r in run.replies[0]]).tolist())
    assert run.bot.system == "Be brief."


# --- what a crash leaves ---------------------------------------------------------------------------------------
class Cut(Exception): pass

@pytest.mark.parametrize("where", ["judge 1", "judge 2", "judge 3", "training 1", "training 2"])
def test_resume_is_the_run_that_would_have_been(where, tmp_path, monkeypatch):
    whole = improve(brief_model(), PROMPTS, plain, **PAIRS)
    what, number = where.split()
    calls = []
    def cut_at(kind):
        calls.append(kind)
        if calls.count(kind) == int(number) and kind == what: raise Cut
    def judge(prompts, replies): cut_at("judge"); return plain(prompts, replies)
    own = L.TreeTrainer.fit
    def fit(self, **options):
        step = self.training_step
        def first(*a, **k): cut_at("training"); return step(*a, **k)
        self.training_step = first
        return own(self, **options)
    monkeypatch.setattr(L.TreeTrainer, "fit", fit)
    with pytest.raises(Cut): improve(brief_model(), PROMPTS, judge, tmp_path, **PAIRS)
    with pytest.raises(ValueError, match="holds an unfinished run"): improve(brief_model(), PROMPTS, judge, tmp_path, **PAIRS)
    with pytest.raises(ValueError, match="lr: 0.002 then, 0.1 now"): improve(brief_model(), PROMPTS, judge, tmp_path, resume=True, **{**PAIRS, "lr": .1})
    again = improve(brief_model(), PROMPTS, judge, tmp_path, resume=True, **PAIRS)
    assert again.history == whole.history and again.replies == whole.replies and same(state(again), state(whole))
    steps = sum(math.ceil(h["rows"]/PAIRS["batch_size"]) for h in whole.history[:-1])
    assert calls.count("judge") == 3 + (what == "judge") and calls.count("training") == steps + (what == "training") # nothing is done twice


def test_folder_and_more_rounds(tmp_path):
    longer = improve(brief_model(), PROMPTS, plain, **{**SHORT, "rounds": 3})
    run = improve(brief_model(), PROMPTS, plain, tmp_path, **SHORT)
    assert run.history == longer.history[:3] and json.loads((tmp_path/"config.json").read_text())["finished"]
    assert [json.loads(line) for line in (tmp_path/"metrics.jsonl").read_text().splitlines()] == run.history == run.bot.history
    for t in range(3):
        model, _ = load(tmp_path/f"round-{t}")
        rows = [json.loads(line) for line in (tmp_path/f"round-{t}"/"samples.jsonl").read_text().splitlines()]
        assert [r["text"] for r in rows] == [r.text for r in run.replies[t]]
    assert same(lora_state(model), lora_state(run.bot.model)) and same(lora_state(load(tmp_path)[0]), lora_state(model))
    more = improve(brief_model(), PROMPTS, lambda p, r: plain(p, r), tmp_path, resume=True, **{**SHORT, "rounds": 3})
    assert more.history == longer.history and more.replies == longer.replies and same(state(more), state(longer))
    fewer = improve(brief_model(), PROMPTS, None, tmp_path, resume=True, **SHORT)        # all is there: nobody is asked
    assert fewer.history == run.history and fewer.replies == run.replies


def test_overwrite_and_other_folders(tmp_path):
    (tmp_path/"round-7").mkdir()
    with pytest.raises(Cut): improve(brief_model(), PROMPTS, lambda p, r: (_ for _ in ()).throw(Cut()), tmp_path, **SHORT)
    assert (tmp_path/"round-7").is_dir()                                                 # not ours: no run lay there before
    run = improve(brief_model(), PROMPTS, plain, tmp_path, overwrite=True, **SHORT)
    assert len(run.history) == 3 and sorted(p.name for p in tmp_path.glob("round-*")) == ["round-0", "round-1", "round-2"]
    (tmp_path/"file").write_text("")
    with pytest.raises(ValueError, match="can't be written to"): improve(brief_model(), PROMPTS, plain, tmp_path/"file"/"x", **SHORT)


KILLED = """
import os, sys; sys.path.insert(0, {tests!r})
from test_loop_align import PROMPTS, SHORT, brief_model, improve, plain
calls = []
def judge(prompts, replies):
    calls.append(1)
    if len(calls) == 3: os._exit(9)
    return plain(prompts, replies)
improve(brief_model(), PROMPTS, judge, sys.argv[1], **SHORT)
"""

@pytest.mark.slow
def test_a_killed_process_is_continued(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED.format(tests=str(ROOT/"tests")), str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 9, done.stderr[-2000:]
    again = improve(brief_model(), PROMPTS, plain, tmp_path, resume=True, **SHORT)
    assert again.history == improve(brief_model(), PROMPTS, plain, **SHORT).history


# --- the picture -----------------------------------------------------------------------------------------------
def test_plot():
    history = [dict(round=t, score=t, gold=-t, kl=2*t, length=3, ended=1, unique=.5, entropy=1) for t in range(3)]
    axes = plot_rounds(history, label="a")
    plot_rounds([{k: v for k, v in h.items() if k != "gold"} for h in history], axes, "b")
    lines = axes.flat[0].get_lines()
    assert [l.get_label() for l in lines] == ["a", "a, gold", "b"] and lines[1].get_ydata().tolist() == [0, -1, -2] and lines[0].get_color() == lines[1].get_color()
    assert axes.flat[1].get_ylabel().endswith("(nats)") and axes.flat[1].get_lines()[0].get_ydata().tolist() == [0, 2, 4] and len(axes.flat[1].get_lines()) == 2
