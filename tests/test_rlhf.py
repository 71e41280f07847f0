"""RLHF from end to end: order statistics by listing, the curves against scipy, noisy labels by simulation, a borrowed base bit for bit, and the studies' data."""
import itertools, math, sys
from collections import Counter

import numpy as np
import pytest
import scipy.integrate, scipy.optimize
import torch
from torch.testing import assert_close

from ftcourse.align.ppo import ppo
from ftcourse.align.reward import RewardModel, add_reward_head, train_reward
from ftcourse.align.rlhf import GoldCurve, RewardAdapter, best_of_n, best_of_n_kl, effective_labels, fit_gold_curve, flip_pairs, noisy_accuracy, report_table
from ftcourse.align.shootout import load_study
from ftcourse.data.batches import Tree
from ftcourse.models import load
from ftcourse.tune.lora import add_lora, lora_parameters
from helpers import ROOT

sys.path.insert(0, str(ROOT/"tests"/"studies"))
import labels as labels_study, rlhf as rlhf_study  # noqa: E402, E401  after the path

PAIRS = [dict(prompt="say it", chosen=" please", rejected=" now"), dict(prompt="again", chosen=" thank you", rejected=" hurry up")]
ASKED, SAID = ["say it", "again", "say it"], [" please", " hurry up", " maybe later"]


# --- best of n ----------------------------------------------------------------------------------------------------
def by_listing(scores, n, values):
    "Every choice of n, ties shared, in exact order."
    found = []
    for chosen in itertools.combinations(range(len(scores)), n):
        top = max(scores[i] for i in chosen)
        best = [values[i] for i in chosen if scores[i] == top]
        found.append(sum(best)/len(best))
    return sum(found)/len(found)


@pytest.mark.parametrize("spread", [1, 3, 1000])                          # all equal, many ties, none
def test_best_of_n_is_the_mean_over_all_choices(spread):
    rng = np.random.default_rng(spread)
    scores, values = rng.integers(0, spread, (2, 3, 7)), rng.normal(size=(2, 3, 7))
    for n in range(1, 8):
        got = best_of_n(torch.tensor(scores), n, torch.tensor(values))
        assert got.shape == (2, 3) and got.dtype == torch.float64
        assert_close(got, torch.tensor([[by_listing(s.tolist(), n, v.tolist()) for s, v in zip(a, b)] for a, b in zip(scores, values)], dtype=torch.float64))
    assert_close(best_of_n(torch.tensor(scores), 7), torch.tensor(scores).double().amax(-1))
    assert_close(best_of_n(torch.tensor(scores), 1), torch.tensor(scores).double().mean(-1))


def test_best_of_n_is_unbiased_for_new_replies():
    p, score, value, n, N = (.5, .3, .2), (0., 1., 1.), (5., -1., 3.), 2, 4
    def mean(size, f): return sum(math.prod(p[i] for i in drawn)*f(drawn) for drawn in itertools.product(range(3), repeat=size))
    fresh = mean(n, lambda d: by_listing([score[i] for i in d], n, [value[i] for i in d]))     # n new replies, the best of them
    pooled = mean(N, lambda d: best_of_n(torch.tensor([score[i] for i in d]), n, torch.tensor([value[i] for i in d])).item())
    assert pooled == pytest.approx(fresh, abs=1e-12)


def test_best_of_n_refuses_what_it_cannot_do():
    for n in (0, 4):
        with pytest.raises(ValueError, match=f"n={n}, but there are 3 replies"): best_of_n(torch.zeros(3), n)
    with pytest.raises(ValueError, match="each reply needs one of both"): best_of_n(torch.zeros(3), 1, torch.zeros(2))
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="isn't a finite number"): best_of_n(torch.tensor([0., bad]), 1)


def test_kl_of_best_of_n():
    for n in (1, 2, 7, 64):
        density = lambda u: n*u**(n - 1)
        assert best_of_n_kl(n) == pytest.approx(scipy.integrate.quad(lambda u: density(u)*math.log(density(u)) if u else 0., 0, 1)[0], abs=1e-6)
    with pytest.raises(ValueError, match="n=0"): best_of_n_kl(0)


@pytest.mark.parametrize("ties", [False, True])
def test_kl_of_best_of_n_is_a_bound_for_a_list_of_replies(ties):
    p, scores = np.random.default_rng(0).dirichlet(np.ones(5)), [0, 0, 1, 2, 2] if ties else [0, 1, 2, 3, 4]
    for n in (2, 3):
        q = np.zeros(5)
        for drawn in itertools.product(range(5), repeat=n):
            top = max(scores[i] for i in drawn)
            for i in (winners := [i for i in drawn if scores[i] == top]): q[i] += math.prod(p[j] for j in drawn)/len(winners)
        assert q.sum() == pytest.approx(1) and 0 < (q*np.log(q/p)).sum() < best_of_n_kl(n)


# --- the curves of Gao et al. ---------------------------------------------------------------------------------------
FORMS = {"rl": lambda d, a, b: d*(a - b*np.log(d)), "bon": lambda d, a, b: d*(a - b*d)}

@pytest.mark.parametrize("kind", FORMS)
def test_fit_is_scipys(kind):
    rng = np.random.default_rng(1)
    d = rng.uniform(.1, 5, 30)
    gold = FORMS[kind](d, 1.5, .4) + .1*rng.normal(size=30)
    fit, (a, b) = fit_gold_curve(d, gold, kind), scipy.optimize.curve_fit(FORMS[kind], d, gold)[0]
    assert (fit.alpha, fit.beta) == (pytest.approx(a, abs=1e-6), pytest.approx(b, abs=1e-6))
    assert_close(fit(d), torch.tensor(FORMS[kind](d, a, b)), atol=1e-6, rtol=1e-6)
    top = scipy.optimize.minimize_scalar(lambda x: -FORMS[kind](x, a, b), bounds=(1e-3, 100), method="bounded", options=dict(xatol=1e-9)).x
    assert fit.peak == pytest.approx(top, rel=1e-5)


def test_distance_0_says_nothing():
    d, gold = [0., .5, 1., 2.], [9., 1., 1.5, 1.]
    assert fit_gold_curve(d, gold) == fit_gold_curve(d[1:], gold[1:])
    for d in ([0., 1.], [1., 1.], []):
        with pytest.raises(ValueError, match="two different distances"): fit_gold_curve(d, [1.]*len(d))
    with pytest.raises(ValueError, match="two lists of the same length"): fit_gold_curve([1., 2.], [1.])
    with pytest.raises(ValueError, match="kind='ppo'"): fit_gold_curve([1., 2.], [1., 2.], "ppo")


@pytest.mark.parametrize("curve, peak", [(GoldCurve(1., -.1), math.inf), (GoldCurve(1., 0., "bon"), math.inf), (GoldCurve(-1., 0., "bon"), 0.), (GoldCurve(-1., .5, "bon"), 0.),
                                         (GoldCurve(1., .5, "bon"), 1.), (GoldCurve(2., 2.), 1.)])
def test_peak_at_the_edges(curve, peak): assert curve.peak == peak


# --- labels that are wrong ----------------------------------------------------------------------------------------------
def test_flip_turns_exactly_so_many():
    rows = [dict(prompt=f"p{i}", chosen=f"good {i}", rejected=f"bad {i}") for i in range(40)]
    for share, n in ((0, 0), (.1, 4), (.26, 10), (1, 40)):
        flipped = flip_pairs(rows, share, seed=3)
        turned = [r["chosen"].startswith("bad") for r in flipped]
        assert sum(turned) == n and all({r["chosen"], r["rejected"]} == {f"good {i}", f"bad {i}"} and r["prompt"] == f"p{i}" for i, r in enumerate(flipped))
    assert flip_pairs(rows, .5, seed=1) == flip_pairs(rows, .5, seed=1) != flip_pairs(rows, .5, seed=2)
    assert rows[0]["chosen"] == "good 0"                                                       # its own list
    with pytest.raises(ValueError, match="share=1.5"): flip_pairs(rows, 1.5)
    with pytest.raises(ValueError, match="takes pairs, these rows hold labels"): flip_pairs([dict(prompt="p", completion="c", label=True)], .5)


def test_an_effective_label_carries_what_a_clean_one_does():
    rng, n, trials = np.random.default_rng(0), 2_000, 20_000
    def spread(flip): # of the estimated gap between two equally good replies, over many trials
        won = rng.binomial(n, .5, trials)/n                                                    # a fair choice stays fair when some are turned round
        p = (won - flip)/(1 - 2*flip)
        return np.var(np.log(p/(1 - p)))
    for flip in (.1, .2): assert effective_labels(1, flip) == pytest.approx(spread(0)/spread(flip), rel=.05)
    assert effective_labels(100, .25) == 25 and effective_labels(100, 0) == 100 and effective_labels(100, .5) == 0
    with pytest.raises(ValueError, match="flip=2"): effective_labels(1, 2)


def test_noisy_accuracy_by_drawing():
    rng = np.random.default_rng(0)
    right, wrong_label = rng.random(200_000) < .8, rng.random(200_000) < .3
    assert noisy_accuracy(.8, .3) == pytest.approx((right != wrong_label).mean(), abs=.005)
    assert noisy_accuracy(1, .1) == pytest.approx(.9) and noisy_accuracy(.7, 0) == .7 and noisy_accuracy(.7, .5) == .5
    with pytest.raises(ValueError, match="flip=-0.1"): noisy_accuracy(.5, -.1)


# --- one base -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def reward(): return train_reward("tiny", PAIRS, n_epochs=4, lr=1e-2, progress=False)

def policy_model(r=8, by=.1):
    model, tokenizer = load("tiny")
    add_lora(model, r=r, alpha=16)
    for w in lora_parameters(model): w.data += by
    return model, tokenizer


def test_borrowed_base_gives_the_same_scores(reward):
    reward.model.score.gain.fill_(2.5), reward.model.score.bias.fill_(-.3)
    model, tokenizer = policy_model()
    kept, trees = RewardAdapter(reward), [Tree((5, 6, 7), ((8, 9, 2), (10, 2)), ((1, 1, 1), (1, 1)))]
    assert kept.reward(model)(ASKED, SAID).equal(reward(ASKED, SAID))
    with kept.on(model) as borrowed: assert borrowed.score_trees(trees).equal(reward.score_trees(trees))
    plain = policy_model(by=0.)[0]
    add_reward_head(plain)
    plain.score.load_state_dict(reward.model.score.state_dict())
    assert not RewardModel(plain, tokenizer).scores(ASKED, SAID).allclose(reward(ASKED, SAID))  # it isn't the head alone


def test_policy_comes_back(reward):
    model, _ = policy_model()
    old, kept = [w.clone() for w in lora_parameters(model)], RewardAdapter(reward)
    with pytest.raises(RuntimeError, match="on purpose"):
        with kept.on(model): raise RuntimeError("on purpose")
    assert not hasattr(model, "score") and all(w.equal(o) for w, o in zip(lora_parameters(model), old))
    for other in (policy_model(r=4)[0], load("tiny")[0]):
        with pytest.raises(ValueError, match="another rank|LoRA"): kept.reward(other)(ASKED, SAID)


def test_taken_off_it_no_longer_follows_the_model():
    reward = train_reward("tiny", PAIRS, n_epochs=2, lr=1e-2, progress=False)
    scores, kept = reward(ASKED, SAID), RewardAdapter(reward)
    for p in (*lora_parameters(reward.model), reward.model.score.weight): p.data += 1
    del reward.model.score
    assert kept.reward(reward.model)(ASKED, SAID).equal(scores)


def test_ppo_with_a_reward_on_its_own_base(reward):
    kept, (model, tokenizer) = RewardAdapter(reward), policy_model(by=0.)
    weights, head, n = [w.clone() for w in kept.weights], kept.head.weight.clone(), []
    scores = kept.reward(model)
    def watched(prompts, replies):
        n.append(scores(prompts, replies).equal(reward(prompts, replies)))
        return scores(prompts, replies)
    bot = ppo((model, tokenizer), [f"say {i}" for i in range(4)], watched, n_updates=2, n_prompts=4, n_samples=2, n_epochs=1, minibatch=2, max_new_tokens=4, lr=1e-2, progress=False)
    assert [h["first_ratio"] for h in bot.history] == [1., 1.] and n == [True, True]
    assert all(a.equal(b) for a, b in zip(weights, kept.weights)) and kept.head.weight.equal(head)   # the judge learnt nothing
    assert not all((w == 0).all() for w in lora_parameters(model)[1::2])                             # the policy did


# --- tables and studies ---------------------------------------------------------------------------------------------------
def test_report_table():
    got = report_table([dict(a=1/3, b="x", c=2), dict(a=12345., c=None), dict(b="é", a=0.)], dict(a="number", b="b"))
    assert got == "| number   | b |\n|----------|---|\n| 0.333    | x |\n| 1.23e+04 | – |\n| 0        | é |"


def test_no_prompt_is_in_two_parts():
    sizes = rlhf_study.SIZES["smollm2-135m"]
    d = rlhf_study.data(sizes)
    assert (len(d["train"]), len(d["gold"]), len(d["judged"]), len(d["prompts"])) == (192, 640, 160, 48)
    train, gold, held = ({str(r["prompt"]) for r in d[k]} for k in ("train", "gold", "judged"))
    assert not train & gold and not (train | gold) & held and {str(p) for p in d["prompts"]} <= held
    ptx = rlhf_study.instructions(r["prompt"] for r in d["gold"])
    assert len(ptx) >= 192 and not {str(r["messages"][:-1]) for r in ptx} & (held | train)
    assert len(rlhf_study.instructions(d["prompts"])) >= 48
    labelled, held = labels_study.data(labels_study.N_HELD)
    assert len(held) == 160 and len(labelled) >= max(labels_study.COUNTS) and not {str(r["prompt"]) for r in labelled} & {str(r["prompt"]) for r in held}


def test_rlhf_file_is_whole():
    study = load_study("rlhf")
    names = Counter(r["name"] for r in study["runs"])
    n = len(study["seeds"])
    assert names == {"PPO": n, "PPO + ptx": n, "DPO": n, "PPO, β = 0": 1, "PPO, rate × 10": 1, "DPO, β / 5": 1, "DPO, rate × 10": 1}
    for measured in [r["held"] for r in study["runs"]] + [p[k] for p in study["pools"] for k in ("sft", "base")]:
        assert len(measured["proxy"]) == len(measured["gold"]) == len(measured["kl"]) == len(measured["lengths"]) == study["n_prompts"]
        assert all(math.isfinite(x) for k in ("proxy", "gold", "kl") for x in measured[k]) and 0 <= measured["ended"] <= 1 and len(measured["tax"]["boolean_right"]) == study["n_tax"]
    for pool in study["pools"]:
        assert all(len(pool["pool"][k]) == study["n_pool"] and {len(row) for row in pool["pool"][k]} == {study["n_samples"]} for k in ("proxy", "gold", "lengths"))
        assert all(abs(k) < 1e-3 for k in pool["sft"]["kl"])                                   # the reference itself
    for run in study["runs"]:
        if not run.get("history"): continue
        assert run["history"][0]["first_ratio"] == 1 and run["history"][0]["kl"] == 0 and run["history"][0]["reward"] == pytest.approx(run["history"][0]["proxy"], abs=1e-5)
        assert ("ptx_loss" in run["history"][0]) == (run["name"] == "PPO + ptx")


def test_labels_file_is_whole():
    study = load_study("labels")
    settings = {(r["n_labels"], r["flip"], r["seed"]) for r in study["runs"]}
    assert settings == {(n, f, s) for n, f in [*((n, 0.) for n in study["counts"]), *((study["at"], f) for f in study["flips"])] for s in study["seeds"]}
    for r in study["runs"]: assert [m > 0 for m in r["margins"]] == [bool(x) for x in r["right"]] or min(abs(m) for m in r["margins"]) < 1e-3
    assert all(len(r["right"]) == study["n_held"] for r in study["runs"]) and len(study["longer"]) == study["n_held"]
