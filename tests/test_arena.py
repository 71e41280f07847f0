"""The arena: ratings against scikit-learn and arena-rank, laws of Elo and Bradley-Terry, intervals with known truth, blind votes and the way back to battles."""
import csv, itertools, json, math, random
from collections import Counter

import numpy as np
import pytest

from ftcourse.align.preferences import Judgement, Judgements, Session, make_tasks, row_key
from ftcourse.data.reading import DataError
from ftcourse.evals import arena as A
from ftcourse.evals.arena import arena_rows, battles_from, bradley_terry, elo, expected_score, leaderboard, simulate_battles, votes_needed

TRUTH = {"a": 1200.0, "b": 1100.0, "c": 1000.0, "d": 950.0, "e": 750.0}


def battle(a, b, winner): return {"model_a": a, "model_b": b, "winner": winner}


def battles_of(*results): return [battle(a, b, w) for a, b, *counts in results for w, n in zip(("model_a", "tie", "model_b"), counts) for _ in range(n)]


def turned(battles):
    "The same battles with the sides exchanged."
    other = {"model_a": "model_b", "model_b": "model_a", "tie": "tie"}
    return [battle(b["model_b"], b["model_a"], other[b["winner"]]) for b in battles]


def logistic(battles, names):
    "Log-strengths by scikit-learn's logistic regression without penalty: a tie is two rows of half weight."
    from sklearn.linear_model import LogisticRegression
    X, y, w = [], [], []
    for b in battles:
        row = (np.array(names) == b["model_a"]).astype(float) - (np.array(names) == b["model_b"])
        for label, weight in {"model_a": [(1, 1)], "model_b": [(0, 1)], "tie": [(1, .5), (0, .5)]}[b["winner"]]: X.append(row), y.append(label), w.append(weight)
    X += [-x for x in X]  # both sides of each battle, so that there are two classes whoever stands where
    theta = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10, max_iter=1000).fit(np.array(X), np.r_[y, 1 - np.array(y)], np.r_[w, w]).coef_[0]
    return 1000 + 400/math.log(10)*(theta - theta.mean())


# --- expected scores and Elo -------------------------------------------------------------------------------------
def test_expected_score_by_hand():
    assert expected_score(0) == .5 and math.isclose(expected_score(400), 10/11) and math.isclose(expected_score(-800), 1/101)
    assert np.allclose(expected_score(np.array([400, -400])), [10/11, 1/11])


def test_elo_by_hand():
    # item 99
    first, second = battle("x", "y", "model_a"), battle("y", "x", "tie")
    assert elo([first], k=32) == {"x": 1016, "y": 984}
    back = 32*(.5 - 1/(1 + 10**(32/400)))  # y, 32 points below, ties
    assert elo([first, second], k=32, start=0) == pytest.approx({"x": 16 - back, "y": -16 + back})
    assert elo([second, first], k=32, start=0) == pytest.approx({"x": 16, "y": -16}), "another order, other ratings"
    assert elo([second], start=700) == {"x": 700, "y": 700} and elo([first])["x"] == 1002


def test_elo_keeps_the_sum_and_knows_no_sides():
    battles = simulate_battles(TRUTH, 3000, ties=.2, seed=3)
    ratings = elo(battles, k=20)
    assert math.isclose(sum(ratings.values()), 5000) and elo(turned(battles), k=20) == pytest.approx(ratings)
    assert list(ratings.values()) == sorted(ratings.values(), reverse=True)


def test_many_passes_of_elo_end_at_the_maximum():
    battles = simulate_battles({"a": 1100, "b": 1000, "c": 950}, 300, seed=1)
    assert elo(battles*600, k=.1) == pytest.approx(bradley_terry(battles), abs=1)


# --- Bradley-Terry -----------------------------------------------------------------------------------------------
def test_order_of_the_battles_does_not_matter_for_bradley_terry_and_does_for_elo():
    # item 99
    battles = simulate_battles(TRUTH, 2000, ties=.2)
    orders = [random.Random(i).sample(battles, len(battles)) for i in range(4)] + [battles[::-1]]
    rated, boards = bradley_terry(battles), [leaderboard(o, n=20) for o in (battles, orders[0])]
    assert all(bradley_terry(o) == rated and list(bradley_terry(o)) == list(rated) for o in orders)
    assert str(boards[0]) == str(boards[1]) and np.array_equal(boards[0].resamples, boards[1].resamples), "intervals neither"
    assert len({elo(o)["a"] for o in orders}) == 5
    assert bradley_terry(turned(battles)) == pytest.approx(rated, abs=1e-6)


def test_two_models_by_hand():
    for wins, ties, losses in ((3, 0, 1), (1, 5, 0), (7, 4, 9), (1000, 0, 1)):
        gap = 400*math.log10((wins + ties/2)/(losses + ties/2))
        assert bradley_terry(battles_of(("x", "y", wins, ties, losses))) == pytest.approx({"x": 1000 + gap/2, "y": 1000 - gap/2})


def test_a_cycle_and_a_chain_by_hand():
    assert bradley_terry(battles_of(("r", "s", 9, 0, 1), ("s", "p", 9, 0, 1), ("p", "r", 9, 0, 1))) == pytest.approx(dict(r=1000, s=1000, p=1000))
    # no loop: each gap is that of its own pair
    chain = bradley_terry(battles_of(("x", "y", 10, 0, 1), ("y", "z", 100, 0, 1)), anchor="z", anchor_rating=0)
    assert chain == pytest.approx({"x": 1200, "y": 800, "z": 0}, abs=1e-6)


@pytest.mark.parametrize("seed, ties, n", [(0, 0, 400), (1, .3, 400), (2, .5, 3000)])
def test_equals_logistic_regression(seed, ties, n):
    # item 99
    battles = simulate_battles(TRUTH, n, ties, seed)
    assert [bradley_terry(battles)[m] for m in "abcde"] == pytest.approx(logistic(battles, list("abcde")), abs=.01)


def test_likelihood_equations_on_a_large_uneven_board():
    draw = np.random.default_rng(0)
    names = [f"m{i}" for i in range(40)]
    skill = dict(zip(names, draw.normal(1000, 300, 40)))
    battles = [b for k, n in ((6, 3000), (40, 2000)) for b in simulate_battles({m: skill[m] for m in names[:k]}, n, .2, seed=k)]
    rated, expected, counted = bradley_terry(battles, prior=.1), Counter(), Counter()
    for b in battles:
        p = 1/(1 + 10**((rated[b["model_b"]] - rated[b["model_a"]])/400))
        score = {"model_a": 1, "tie": .5, "model_b": 0}[b["winner"]]
        expected.update({b["model_a"]: p, b["model_b"]: 1 - p}), counted.update({b["model_a"]: score, b["model_b"]: 1 - score})
    for a, b in itertools.permutations(names, 2):  # the prior's ties: .1 for each model, spread over 39 others
        expected[a] += .1/39/(1 + 10**((rated[b] - rated[a])/400))
        counted[a] += .1/39/2
    assert {m: expected[m] for m in names} == pytest.approx({m: counted[m] for m in names}, abs=1e-6)


@pytest.mark.parametrize("odds, M", [(1e6, 2), (1e6, 30), (3, 100)])
def test_steep_chains_converge(odds, M):
    wins = np.zeros((M, M))
    wins[range(M - 1), range(1, M)], wins[range(1, M), range(M - 1)] = odds, 1
    assert -np.diff(A._fit(wins)) == pytest.approx(np.full(M - 1, math.log(odds)), rel=1e-6)


def test_where_full_newton_steps_run_away():
    wins = np.array([[0, 0, 0, 7, 19], [0, 0, 0, 0, 8571], [0, 943, 0, 1, 340], [4120, 0, 162238, 0, 11], [8, 0, 2, 4, 0]], dtype=float)
    theta = A._fit(wins)
    expected = [sum((wins[i, j] + wins[j, i])/(1 + math.exp(theta[j] - theta[i])) for j in range(5)) for i in range(5)]
    assert expected == pytest.approx(wins.sum(1), rel=1e-6)


def test_what_cannot_settle_is_said():
    with pytest.raises(ValueError, match="don't settle.*prior"): A._fit(np.array([[0, 5.], [0, 0]]))


def test_many_fits_at_once_are_single_fits():
    wins = np.random.default_rng(0).integers(1, 9, (7, 4, 4)).astype(float)*(1 - np.eye(4))
    wins[0], wins[1, 0] = 1 - np.eye(4), [0, 1e5, 1e5, 1e5]  # one that is done at once, one that takes long
    assert np.allclose(A._fit(wins), [A._fit(w) for w in wins], atol=1e-9)


def test_anchor():
    # item 99
    battles = simulate_battles(TRUTH, 1000, ties=.2)
    free, anchored = bradley_terry(battles), bradley_terry(battles, anchor="c", anchor_rating=1114)
    assert math.isclose(np.mean(list(free.values())), 1000) and anchored["c"] == 1114
    assert {m: anchored[m] - anchored["a"] for m in TRUTH} == pytest.approx({m: free[m] - free["a"] for m in TRUTH})
    with pytest.raises(ValueError, match="no battle has 'z'"): bradley_terry(battles, anchor="z")


def test_prior():
    lopsided = battles_of(("x", "y", 5, 0, 0))
    with pytest.raises(ValueError, match="x never lost"): bradley_terry(lopsided)
    gap = 400*math.log10(5.5/.5)  # one imaginary tie
    assert bradley_terry(lopsided, prior=1) == pytest.approx({"x": 1000 + gap/2, "y": 1000 - gap/2})
    three = bradley_terry(battles_of(("x", "y", 5, 0, 0), ("u", "v", 1, 0, 0)), prior=2)
    assert three["x"] > three["u"] > three["v"] > three["y"] and math.isclose(three["x"] + three["y"], 2000)
    with pytest.raises(ValueError, match="prior=-1"): bradley_terry(lopsided, prior=-1)


@pytest.mark.parametrize("results, said", [
    ([("x", "y", 1, 0, 0)], "x never lost"), ([("y", "x", 0, 0, 3)], "x never lost"), ([("x", "y", 1, 0, 1), ("y", "z", 2, 0, 0), ("x", "z", 1, 0, 0)], "x, y never lost"),
    ([("x", "y", 1, 1, 1), ("u", "v", 1, 1, 1)], "no battle joins u, v"), ([("x", "y", 1, 0, 1), ("z", "y", 0, 0, 4)], "x, y never lost"),
    ([(f"m{i}", f"m{i+1}", 1, 0, 1) for i in range(6)] + [("m3", "w", 9, 0, 0)], "m0, m1, m2 and others never lost")])
def test_votes_that_fix_no_ratings(results, said):
    for rate in (bradley_terry, leaderboard):
        with pytest.raises(ValueError, match=said + ".*prior=1"): rate(battles_of(*results))


def test_finite_exactly_where_a_chain_of_wins_leads_everywhere():
    "All 64 sets of wins among three models, against walking along the wins; ratings are there exactly for these."
    pairs = list(itertools.permutations("xyz", 2))
    for chosen in itertools.product((0, 1), repeat=6):
        wins = [p for p, c in zip(pairs, chosen) if c]
        if {m for p in wins for m in p} != set("xyz"): continue
        reach = {m: {m} for m in "xyz"}
        for _, (a, b) in itertools.product(range(3), wins): [reach[m].add(b) for m in "xyz" if a in reach[m]]
        try: bradley_terry([battle(a, b, "model_a") for a, b in wins])
        except ValueError as e: assert any(len(r) < 3 for r in reach.values()) and "never lost or tied" in str(e), wins
        else: assert all(len(r) == 3 for r in reach.values()), wins


@pytest.mark.parametrize("wrong, said", [
    ({"model_a": "x", "model_b": "y"}, "winner=None"), ({"model_a": "x", "model_b": "y", "winner": "x"}, "winner='x'"), ({"model_a": "x", "model_b": "y", "winner": ["tie"]}, "must be one of"),
    ({"model_a": "x", "model_b": "y", "winner": "tie (bothbad)"}, "write 'tie'"), ({"model_a": "x", "winner": "tie"}, "needs `model_a`"), ({"model_a": "", "model_b": "y", "winner": "tie"}, "needs `model_a`"),
    ({"model_a": 1, "model_b": "y", "winner": "tie"}, "as text"), ({"model_a": "x", "model_b": "x", "winner": "tie"}, "both sides"), (("x", "y", "tie"), "not a dict"), ("model_a", "to_dict")])
def test_bad_battles(wrong, said):
    good = battles_of(("x", "y", 2, 0, 1))
    for rate in (elo, bradley_terry, leaderboard):
        with pytest.raises(ValueError, match=f"battle 3 .*{said}"): rate([*good, wrong, *good])


def test_no_battles_and_bad_numbers():
    battles = battles_of(("x", "y", 2, 0, 1))
    for rate in (elo, bradley_terry, leaderboard):
        with pytest.raises(ValueError, match="no battles"): rate([])
    for k in (0, -1, math.nan):
        with pytest.raises(ValueError, match="k="): elo(battles, k=k)
    for wrong in (dict(level=0), dict(level=1), dict(n=0)):
        with pytest.raises(ValueError, match="level="): leaderboard(battles, **wrong)
    with pytest.raises(ValueError, match="battle 0 needs `annotator`"): leaderboard(battles, by="annotator")


def test_battles_from_files(tmp_path):
    battles = battles_of(("x", "y", 3, 1, 2), ("y", "z", 2, 2, 1))
    (tmp_path/"b.jsonl").write_text("".join(json.dumps(b) + "\n" for b in battles))
    with open(tmp_path/"b.csv", "w", newline="") as f:
        table = csv.DictWriter(f, list(battles[0]))
        table.writeheader()
        table.writerows(battles)
    for name in ("b.jsonl", "b.csv"):
        assert bradley_terry(tmp_path/name) == bradley_terry(str(tmp_path/name)) == bradley_terry(battles) and elo(tmp_path/name) == elo(battles)
    (tmp_path/"torn.jsonl").write_text('{"model_a": "x", "model')
    with pytest.raises(DataError): bradley_terry(tmp_path/"torn.jsonl")


def test_a_generator_is_read_once(): assert elo(b for b in battles_of(("x", "y", 1, 0, 0))) == {"x": 1002, "y": 998}


# --- simulated votes ---------------------------------------------------------------------------------------------
def test_simulated_scores_and_ties():
    ratings = {"x": 1100.0, "y": 1000.0, "z": 700.0}
    battles = simulate_battles(ratings, 60_000, ties=.4)
    for a, b in itertools.permutations(ratings, 2):
        scores = np.array([{"model_a": 1, "tie": .5, "model_b": 0}[r["winner"]] for r in battles if (r["model_a"], r["model_b"]) == (a, b)])
        p = 1/(1 + 10**((ratings[b] - ratings[a])/400))
        assert abs(len(scores) - 10_000) < 450 and abs(scores.mean() - p) < .02 and abs((scores == .5).mean() - 1.6*p*(1 - p)) < .02
    assert battles == simulate_battles(ratings, 60_000, ties=.4) != simulate_battles(ratings, 60_000, ties=.4, seed=1)
    for wrong in (({"x": 1}, 5), (ratings, 5, .6), (ratings, 5, -.1)):
        with pytest.raises(ValueError, match="simulate_battles"): simulate_battles(*wrong)


# --- intervals ---------------------------------------------------------------------------------------------------
def test_interval_against_the_binomial():
    # item 99: with two models the gap is a function of the wins alone, so the exact quantiles are the binomial's
    from scipy.stats import binom
    low, high = (400*math.log10(k/(200 - k)) for k in binom.ppf([.025, .975], 200, .7))
    gap, *bounds = leaderboard(battles_of(("x", "y", 140, 0, 60)), n=8000).difference("x", "y")
    assert gap == pytest.approx(400*math.log10(7/3)) and bounds == pytest.approx([low, high], abs=5)  # one win more or less is 4 points
    narrow = leaderboard(battles_of(("x", "y", 140, 0, 60)), n=2000, level=.5).difference("x", "y")
    assert low < narrow[1] - 20 < gap < narrow[2] + 20 < high


def test_ties_vary_less():
    spread = [np.subtract(*leaderboard(battles_of(("x", "y", wins, ties, wins)), n=2000).resamples.T).std() for wins, ties in ((200, 0), (100, 200))]
    assert spread[1]/spread[0] == pytest.approx(math.sqrt(.5), rel=.08)  # variance of a score 1/4 - ties/4


def test_anchor_changes_intervals_of_ratings_not_of_gaps():
    # item 99
    battles = simulate_battles(TRUTH, 1500, ties=.2)
    free, anchored = leaderboard(battles, n=300), leaderboard(battles, "e", 750.0, n=300)
    assert anchored.interval("e") == (750, 750) and np.diff(anchored.interval("a")) > 1.2*np.diff(free.interval("a"))
    for a, b in itertools.combinations("abcde", 2): assert free.difference(a, b) == pytest.approx(anchored.difference(a, b), abs=1e-6)
    assert free.ranks() == anchored.ranks() and free.names == anchored.names == list("abcde")
    assert dict(zip(free.names, free.ratings)) == pytest.approx(bradley_terry(battles)) and free.n_battles.sum() == 3000


def test_ranks_of_what_cannot_be_told_apart():
    board = leaderboard(battles_of(("x", "y", 50, 0, 50), ("x", "z", 90, 0, 10), ("y", "z", 90, 0, 10)), n=200)
    assert board.ranks() == [1, 1, 3] and board.difference("x", "y")[0] == pytest.approx(0) and board.difference("z", "x")[2] < 0
    lines = str(board).splitlines()
    assert lines[0].split()[:3] == ["rank", "model", "rating"] and [line.split()[0] for line in lines[1:]] == ["1", "1", "3"] and lines[3].split()[-1] == "200"
    with pytest.raises(ValueError, match="no 'w'"): board.interval("w")


def test_coverage():
    "The interval of a gap holds the truth about 95 times of 100 (four standard errors: 8)."
    inside = [low <= 100 <= high for s in range(120) for _, low, high in [leaderboard(simulate_battles({"a": 1100, "b": 1000, "c": 900}, 300, .2, seed=s), n=200, seed=s).difference("a", "b")]]
    assert np.mean(inside) > .87


def test_votes_of_one_person_are_resampled_together():
    # ten people say the same thing a hundred times each: ten opinions, eight for x
    battles = [dict(battle("x", "y", "model_a" if who < 7 else "tie" if who < 9 else "model_b"), annotator=who) for who in range(10) for _ in range(100)]
    alone, together = leaderboard(battles, n=400), leaderboard(battles, by="annotator", prior=1, n=2000)
    # score .8 a person: variance of one person's score .7*.04 + .2*.09 + .1*.64 = .11, so of the mean .011
    assert together.difference("x", "y")[0] == pytest.approx(alone.difference("x", "y")[0], abs=2)
    p = 1/(1 + 10**(-np.subtract(*together.resamples.T)/400))
    assert p.std() == pytest.approx(math.sqrt(.011), rel=.1) and np.diff(together.interval("x")) > 5*np.diff(alone.interval("x"))


def test_resamples_without_ratings_are_said():
    few = battles_of(("x", "y", 3, 0, 1))
    with pytest.raises(ValueError, match="of 500 resamples.*prior=1"): leaderboard(few)
    assert np.isfinite(leaderboard(few, prior=1).resamples).all()


def test_a_million_votes_need_little_memory_at_once(monkeypatch):
    "Resamples are drawn block by block, and the blocks join to the same number of them."
    sizes, refit = [], A._refit
    monkeypatch.setattr(A, "_refit", lambda votes, counts: sizes.append(counts.shape) or refit(votes, counts))
    board = leaderboard(simulate_battles({f"m{i}": 1000 for i in range(100)}, 50_000, ties=.3), n=150)
    assert len(board.resamples) == 150 == sum(s[0] for s in sizes) and max(np.prod(s) for s in sizes) <= 1_000_000 < sizes[0][1]*150


# --- against arena-rank ------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_equals_arena_rank():
    # item 99
    import pandas as pd
    from arena_rank.models.bradley_terry import BradleyTerry
    from arena_rank.utils.data_utils import PairDataset
    battles = simulate_battles({f"m{i:02}": 1000 + 15*i for i in range(20)}, 20_000, ties=.3)
    data = PairDataset.from_pandas(pd.DataFrame(battles))
    theirs = BradleyTerry(n_competitors=20).compute_ratings_and_cis(data)
    board = leaderboard(battles, n=1000)
    place = [theirs["competitors"].index(m) for m in board.names]
    assert board.ratings == pytest.approx(np.array(theirs["ratings"])[place], abs=.1)
    width = np.array(theirs["rating_upper"] - theirs["rating_lower"])[place]
    ours = np.array([np.diff(board.interval(m))[0] for m in board.names])
    assert ours.mean() == pytest.approx(width.mean(), rel=.05)


# --- votes needed ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("gap, ties", [(30, 0), (100, 0), (100, .4), (-100, .4), (250, .1)])
def test_votes_needed_by_simulation(gap, ties):
    n, p = votes_needed(gap, ties), 1/(1 + 10**(-abs(gap)/400))
    counts = np.random.default_rng(0).multinomial(n, [p - ties/2, ties, 1 - p - ties/2], 20_000)
    z = (counts[:, 0] + counts[:, 1]/2 - n/2)/math.sqrt(n*(1 - ties)/4)
    assert (z > 1.96).mean() == pytest.approx(.8, abs=.04)


def test_votes_needed_limits():
    assert votes_needed(5) > 100*votes_needed(100)/4 and votes_needed(100) == votes_needed(-100)
    assert votes_needed(100, power=.95) > votes_needed(100) and votes_needed(100, level=.99) > votes_needed(100) > votes_needed(100, level=.8)
    # a published textbook figure: a proportion of 0.6 against 0.5, 80 % power, 5 %: 194 (Fleiss, without correction)
    assert votes_needed(400*math.log10(.6/.4)) in (193, 194)
    for wrong in (dict(gap=0), dict(gap=10, power=.4), dict(gap=10, power=1), dict(gap=10, level=0), dict(gap=400, ties=.5), dict(gap=10, ties=-.1)):
        with pytest.raises(ValueError, match="votes_needed"): votes_needed(**wrong)


# --- blind votes -------------------------------------------------------------------------------------------------
ANSWERS = {"secret-a": ["one", "two", "three", "four"], "secret-b": ["eins", "two", "drei", "vier"], "secret-c": ["one", "two", "tri", "vier"]}
PROMPTS = ["1?", "2?", "3?", "4?"]


def test_rows_hold_every_pair_once():
    rows, ties = arena_rows(PROMPTS, ANSWERS)
    assert Counter((r["prompt"], frozenset(r["completions"])) for r in rows) == Counter([("1?", frozenset(("one", "eins")))] + [("3?", frozenset(p)) for p in itertools.combinations(("three", "drei", "tri"), 2)]
                                                                                        + [("4?", frozenset(("four", "vier")))])
    for r in rows:
        for text, models in zip(r["completions"], r["models"]): assert all(ANSWERS[m][PROMPTS.index(r["prompt"])] == text for m in models)
    assert sum(len(x)*len(y) for r in rows for x, y in [r["models"]]) + len(ties) == 4*3, "each pair of models on each prompt"
    assert Counter(t["prompt"] for t in ties) == {"1?": 1, "2?": 3, "4?": 1} and all(t["winner"] == "tie" for t in ties)
    assert "secret" not in repr(make_tasks(rows)), "the annotator sees no model"


def test_two_models_a_prompt_are_drawn_evenly():
    answers = {m: [f"{m}{i}" for i in range(600)] for m in "abcd"}
    rows, ties = arena_rows([f"p{i}" for i in range(600)], answers, n_models=2)
    pairs = Counter(frozenset(m[0] for m in r["models"]) for r in rows)
    assert len(rows) == 600 and not ties and len(pairs) == 6 and max(abs(n - 100) for n in pairs.values()) < 37
    assert rows == arena_rows([f"p{i}" for i in range(600)], answers, n_models=2)[0] != arena_rows([f"p{i}" for i in range(600)], answers, n_models=2, seed=1)[0]


@pytest.mark.parametrize("answers, kwargs, said", [({"x": ["1"], "y": ["2", "3"]}, {}, "'x' needs one text for each of the 2"), ({"x": ["1", None], "y": ["2", "3"]}, {}, "'x'"),
                                                   ({"x": ["1", "2"]}, {}, "n_models=1"), ({"x": ["1", "2"], "y": ["3", "4"]}, dict(n_models=3), "between 2 and the 2"), ({"x": ["1", "2"], "y": ["3", "4"]}, dict(n_models=1), "n_models=1")])
def test_answers_that_make_no_rows(answers, kwargs, said):
    with pytest.raises(ValueError, match=said): arena_rows(["p", "q"], answers, **kwargs)


def vote(session, best):
    "Vote through a session: `best` says which of two texts is better, or None."
    while task := session.next(): session.save(task.key, {None: "=", task.replies[0]: "A", task.replies[1]: "B"}[best(*task.replies)])


def test_votes_become_battles(tmp_path):
    rows, ties = arena_rows(PROMPTS, ANSWERS)
    store = Judgements(tmp_path/"v.jsonl")
    for who in ("Ann", "Bo"): vote(Session(rows, store, who), lambda x, y: None if "vier" in (x, y) else min(x, y))  # alphabetically; "vier" ties
    battles = battles_from(Judgements(tmp_path/"v.jsonl"), rows)
    assert len(battles) == 2*(2 + 3 + 2) and Counter(b["annotator"] for b in battles) == {"Ann": 7, "Bo": 7}
    for b in battles:
        i = PROMPTS.index(b["prompt"])
        x, y = ANSWERS[b["model_a"]][i], ANSWERS[b["model_b"]][i]
        assert b["winner"] == ("tie" if "vier" in (x, y) else "model_a" if x < y else "model_b")
    assert {b["model_a"] for b in battles if b["prompt"] == "3?"} == set(ANSWERS), "sides are balanced over people"
    assert set(bradley_terry(battles + ties, prior=1)) == set(ANSWERS) and leaderboard(battles + ties, by="prompt", prior=1, n=20).n_battles.sum() == 2*(14 + len(ties))
    leaderboard(battles + ties, by="annotator", prior=1, n=20)


def test_left_is_model_a():
    rows = [{"prompt": "p", "completions": ["x", "y"], "models": ["mx", "my"]}]
    key = row_key(rows[0])
    for shown, ranks, expected in (((0, 1), (1, 2), ("mx", "my", "model_a")), ((1, 0), (1, 2), ("my", "mx", "model_b")), ((1, 0), (2, 1), ("my", "mx", "model_a")), ((0, 1), (1, 1), ("mx", "my", "tie"))):
        b = battles_from([Judgement(key, "Ann", ranks, shown, 1., "t")], rows)[0]
        assert (b["model_a"], b["model_b"], b["winner"]) == expected


def test_a_ranking_is_all_its_pairs():
    rows = [{"prompt": [{"role": "user", "content": "p"}], "completions": ["x", "y", "z"], "models": ["mx", ["my", "my2"], "mz"]}]
    battles = battles_from([Judgement(row_key(rows[0]), "Ann", (2, 1, 2), (2, 0, 1), 1., "t")], rows)
    assert [(b["model_a"], b["model_b"], b["winner"]) for b in battles] == [("mz", "mx", "tie"), ("mz", "my", "model_b"), ("mz", "my2", "model_b"), ("mx", "my", "model_b"), ("mx", "my2", "model_b")]
    assert json.loads(battles[0]["prompt"])[0]["content"] == "p"


def test_other_judgements_are_counted_and_rows_without_authors_refused(capsys):
    rows = [{"prompt": "p", "completions": ["x", "y"], "models": ["mx", "my"]}, {"prompt": "q", "completions": ["x", "y"], "gold": [1, 2]}]
    judgements = [Judgement(key, "Ann", (1, 2), (0, 1), 1., "t") for key in (row_key(rows[0]), row_key(rows[1]), "other")]
    assert len(battles_from(judgements, rows)) == 1 and "2 of 3 judgements" in capsys.readouterr().out
    for models in (None, ["mx"], "mx"):
        with pytest.raises(ValueError, match="row 0 needs `models`"): battles_from([], [{**rows[0], "models": models}])
    assert battles_from([], [{"prompt": "p", "chosen": "x", "rejected": "y", "models": ["mx", "my"]}]) == []


def test_a_crash_in_the_middle_of_a_vote_loses_that_one_alone(tmp_path, capsys):
    rows, _ = arena_rows(PROMPTS, ANSWERS)
    session = Session(rows, Judgements(tmp_path/"v.jsonl"), "Ann")
    for _ in range(3): session.save(session.next().key, "A")
    before = battles_from(session.judgements, rows)
    (tmp_path/"v.jsonl").write_bytes((tmp_path/"v.jsonl").read_bytes()[:-20])
    store = Judgements(tmp_path/"v.jsonl")
    after = battles_from(store, rows)
    assert Session(rows, store, "Ann").done() == 2 and after == before[:len(after)] and "was torn" in capsys.readouterr().out
