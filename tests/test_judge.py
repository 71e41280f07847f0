"""Judges: verdicts and orders by enumeration, length control against scikit-learn and alpaca-eval, an endpoint against a server that fails."""
import itertools, math, sys, types, warnings

import numpy as np
import pytest

from ftcourse.evals.judge import (CostCap, Endpoint, LocalJudge, Pairs, annotations, arena_hard_score, fit_l1, grade, grade_criteria, judge_pairs,
                                  length_controlled_win_rate, mt_answers, mt_judge, mt_scores, parse_criteria, parse_rating, parse_verdict, self_preference, win_rate)
from judge_stub import Stub, completion

NAN = math.nan
ROWS = [{"prompt": f"Question {i}"} for i in range(4)]
def same(got, expected): return np.array_equal(got, expected, equal_nan=True)


# --- reading ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text, verdict", [("[[A]]", 1), ("so [[B]].", 0), ("[[C]]", 0.5), ("[[A]] if A is better. I say [[B]]", 0), ("[[ A ]]", 1),
                                           ("A", NAN), ("[A]", NAN), ("[[D]]", NAN), ("[[A>B]]", NAN), ("", NAN), (None, NAN), ("[[a]]", NAN)])
def test_verdicts(text, verdict): assert same([parse_verdict(text)], [verdict])


@pytest.mark.parametrize("text, rating", [("Rating: [[7]]", 7), ("[[7.5]]", 7.5), ("[[3]] ... after all [[4]]", 4), ("Rating: [6]", 6), ("[5] of [[8]]", 8), ("[[0]]", NAN),
                                          ("[[11]]", NAN), ("[[-2]]", NAN), ("7/10", NAN), ("[[seven]]", NAN), (None, NAN)])
def test_ratings(text, rating): assert same([parse_rating(text)], [rating])


GOOD = {"accuracy": 2.0, "fluency": 5.0}
@pytest.mark.parametrize("text, found", [('{"accuracy": 2, "fluency": 5}', GOOD), ('```json\n{"fluency": 5.0,\n "accuracy": 2, "more": 9}\n``` done', GOOD), ('{"accuracy": 1} no: {"accuracy": 2, "fluency": 5}', GOOD),
                                         ('{"accuracy": 2, "fluency": 6}', None), ('{"accuracy": 2}', None), ('{"accuracy": "2", "fluency": 5}', None), ('{"accuracy": true, "fluency": 5}', None),
                                         ('{"accuracy": 2, "fluency": 5', None), ('{"accuracy": 2, "fluency": NaN}', None), ("Sorry.", None), (None, None)])
def test_malformed_json_is_no_judgement(text, found):
    got = parse_criteria(text, ["accuracy", "fluency"])
    assert got == found if found else all(math.isnan(v) for v in got.values())


# --- both orders -----------------------------------------------------------------------------------------
def test_every_pair_of_verdicts():
    "All 4 x 4 verdicts of two orders, the merged result written out as FastChat's rule has it: agreement, else a tie."  # item 97
    merged = {("A", "B"): 1, ("B", "A"): 0, ("C", "C"): 0.5, ("A", "A"): 0.5, ("B", "B"): 0.5, ("A", "C"): 0.5, ("B", "C"): 0.5, ("C", "A"): 0.5, ("C", "B"): 0.5}
    agreed = {("A", "B"), ("B", "A"), ("C", "C")}
    for one, two in itertools.product(["A", "B", "C", "?"], repeat=2):
        found = judge_pairs(lambda chats: [f"[[{one}]]", f"[[{two}]]"], ROWS[:1], ["x"], ["y"])
        assert same(found.scores, [merged.get((one, two), NAN)])
        assert same(found.flips, [float((one, two) not in agreed) if "?" not in (one, two) else NAN])


def test_the_second_question_has_the_answers_swapped():
    "A judge that always takes the first place says nothing; one that knows the better text finds it from both places."  # item 97
    asked = []
    def place(chats):
        asked.extend(c[0]["content"] for c in chats)
        return ["[[A]]"]*len(chats)
    found = judge_pairs(place, ROWS, ["mine"]*4, ["yours"]*4)
    assert [("[Answer A]\nmine" in t, "[Answer B]\nyours" in t) for t in asked] == [(True, True)]*4 + [(False, False)]*4
    assert found.figures() == {"n": 4, "unread": 0, "win_rate": 0.5, "flip_rate": 1.0, "first_place": 1.0}
    knows = judge_pairs(lambda chats: ["[[A]]" if "[Answer A]\nmine" in c[0]["content"] else "[[B]]" for c in chats], ROWS, ["mine"]*4, ["yours"]*4)
    assert knows.figures() == {"n": 4, "unread": 0, "win_rate": 1.0, "flip_rate": 0.0, "first_place": 0.5}


def test_probabilities_take_the_place_out():
    "sigma(q + p) and sigma(q - p) average to more than a half exactly where q > 0, for any p."
    q, p = np.meshgrid(np.linspace(-2.9, 2.9, 14), np.linspace(-6, 6, 9))
    sigmoid = lambda z: 1/(1 + np.exp(-z))
    found = Pairs(sigmoid(q + p).ravel(), sigmoid(q - p).ravel(), weighted=True)
    assert ((found.scores > 0.5) == (q.ravel() > 0)).all()
    assert np.allclose(found.first_place, (sigmoid(q + p) + sigmoid(p - q)).ravel()/2)
    assert (found.flips == (abs(p) > abs(q)).ravel()).all()


def test_unread_rows_are_counted_and_left_out():
    found = judge_pairs(lambda chats: ["[[A]]", None, "[[A]]", "no", "[[B]]", "[[B]]", "[[A]]", "no"], ROWS, ["x"]*4, ["y"]*4)
    assert found.figures() == {"n": 4, "unread": 2, "win_rate": 0.75, "flip_rate": 0.5, "first_place": 0.75}
    with pytest.raises(ValueError, match="none of the 4 rows"): judge_pairs(lambda chats: [None]*8, ROWS, ["x"]*4, ["y"]*4).figures()


@pytest.mark.parametrize("rows, a, b, words", [([], [], [], "no rows"), (ROWS, ["x"]*3, ["y"]*4, "3 answers"), (ROWS, ["x"]*4, ["y", None, "y", "y"], "answer 1 .b. is NoneType"),
                                               ([{"question": "?"}], ["x"], ["y"], "row 0 has no `prompt`")])
def test_rows_that_do_not_fit(rows, a, b, words):
    with pytest.raises(ValueError, match=words): judge_pairs(lambda chats: ["[[A]]"]*len(chats), rows, a, b)


def test_a_judge_must_answer_each_question():
    with pytest.raises(ValueError, match="1 texts to 4 questions"): grade(lambda chats: ["[[5]]"], ROWS, ["x"]*4)


def test_texts_with_braces_and_chats_are_quoted_as_they_are():
    row = {"prompt": [{"role": "user", "content": "A {dict}?"}], "reference": "{'a': 1}"}
    seen = []
    grade(lambda chats: seen.append(chats[0][0]["content"]) or ["[[5]]"], [row], ["{x}"])
    assert all(t in seen[0] for t in ("A {dict}?", "{'a': 1}", "[Answer]\n{x}\n")) and "[Reference answer]" in seen[0]
    grade(lambda chats: seen.append(chats[0][0]["content"]) or ["[[5]]"], ROWS[:1], ["x"])
    assert "[Reference answer]" not in seen[1]
    assert grade_criteria(lambda chats: seen.append(chats[0][0]["content"]) or ['{"wit": 4}'], ROWS[:1], ["x"], {"wit": "Is it {really} witty?"})["wit"] == 4
    assert "- wit: Is it {really} witty?" in seen[2] and '{"wit": 3}' in seen[2]
    with pytest.raises(ValueError, match="'taste'"): grade_criteria(lambda chats: [], ROWS[:1], ["x"], ["taste"])


# --- win rates -------------------------------------------------------------------------------------------
def outputs(name, texts): return [{"instruction": f"Question {i}", "output": t, "generator": name} for i, t in enumerate(texts)]


def random_annotations(n=120, seed=0, unread=0):
    r = np.random.default_rng(seed)
    l1, l2 = r.integers(50, 1500, n), r.integers(50, 2500, n)
    hard = np.random.default_rng(99).normal(size=n)
    scores = 1/(1 + np.exp(-(0.4 + 0.9*np.tanh((l2 - l1)/900) - 0.6*hard + r.normal(size=n))))
    scores[:4] = 1, 0, 0.5, 0.5
    if unread: scores[10:10 + unread] = NAN
    return annotations(outputs("ours", ["m"*k for k in l2]), outputs("base", ["b"*k for k in l1]), scores, "stub"), hard


def gamed_rows(hard, seed=5):
    r = np.random.default_rng(seed)
    return [{"index": i, "preference": float(1/(1 + np.exp(-(r.normal() + side)))), "std_delta_len": float(r.normal() - 1.5*side), "instruction_difficulty": float(h), "not_gamed_baseline": False, "model": name}
            for name, side in (("short", -1), ("long", 1)) for i, h in enumerate(hard)]


def test_win_rate_by_hand():
    rows = [{"preference": p} for p in (2, 1.8, 1, 1.5, 0, 1.5, None, NAN)]
    got = win_rate(rows)
    x = np.array([1, 0.8, 0, 0.5, 0.5, 0.5])
    assert got | {"standard_error": 0} == {"win_rate": pytest.approx(55), "standard_error": 0, "n_wins": 2, "n_wins_base": 1, "n_draws": 3, "n_total": 6, "discrete_win_rate": pytest.approx(100*3.5/6), "n_unread": 2}
    assert got["standard_error"] == pytest.approx(100*math.sqrt(((x - x.mean())**2).sum()/5/6))


@pytest.mark.parametrize("n, d", [(60, 2), (150, 3)])
def test_l1_fit_equals_scikit_learns(n, d):
    "Soft labels are, for scikit-learn, every row twice: label 1 with weight y, label 0 with weight 1 - y. Its saga and its liblinear."
    from sklearn.linear_model import LogisticRegression
    r = np.random.default_rng(n)
    X, weights = r.normal(size=(n, d)), r.random(n) + 0.1
    y = 1/(1 + np.exp(-(X @ r.normal(size=d) + r.normal(size=n))))
    for C in np.logspace(-3, 4, 8):
        got = fit_l1(X, y, weights, C)
        for solver in ("saga", "liblinear"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                theirs = LogisticRegression(penalty="l1", solver=solver, C=C, fit_intercept=False, tol=1e-9, max_iter=20_000, random_state=0)
                theirs.fit(np.concatenate([X, X]), [1]*n + [0]*n, sample_weight=np.concatenate([weights*y, weights*(1 - y)]))
            assert np.allclose(got, theirs.coef_[0], atol=2e-5), (C, solver)


def test_l1_fit_where_the_labels_are_separable():
    "Without the penalty the weight would run away; its optimum has C Σ σ(-w x) x = 1."
    x = np.array([1.0, 2.0, -1.0, -2.0])
    w = fit_l1(x[:, None], (x > 0)*1.0, np.ones(4), 100.0)[0]
    assert 100*(abs(x)/(1 + np.exp(w*abs(x)))).sum() == pytest.approx(1, rel=1e-6)
    assert same(fit_l1(np.array([[0.0, 1.0]]*4), np.array([1.0, 1, 1, 0]), np.ones(4), 10.0)[:1], [0])


def test_folds_are_scikit_learns():
    from sklearn.model_selection import GroupKFold
    for n in (10, 13, 240):
        groups = np.tile(np.arange(n), 2)
        for k, (_, held) in enumerate(GroupKFold(5).split(groups, groups=groups)): assert set(groups[held]) == set(np.arange(n)[(n - 1 - np.arange(n)) % 5 == k])


def by_scikit_learn(X, y, weights):
    "The published fit, every step by scikit-learn."
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold
    n = len(X)
    X2, y2, w2, groups = np.concatenate([X, X]), np.repeat([1, 0], n), np.concatenate([weights*y, weights*(1 - y)]), np.tile(np.arange(n), 2)
    def fit(rows, C):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return LogisticRegression(penalty="l1", solver="liblinear", C=C, fit_intercept=False, tol=1e-8, max_iter=5000, random_state=0).fit(X2[rows], y2[rows], sample_weight=w2[rows])
    def loss(C):
        losses = []
        for seen, held in GroupKFold(5).split(X2, groups=groups):
            held = held[held < n]
            p = fit(seen, C).predict_proba(X2[held])[:, 1]
            losses.append(-(weights[held]*(y[held]*np.log(p) + (1 - y[held])*np.log(1 - p))).mean())
        return np.mean(losses)
    return fit(np.arange(2*n), min(np.logspace(-4, 4, 10), key=loss)).coef_[0]


@pytest.mark.parametrize("form", ["minimal", "v1"])
def test_length_control_equals_scikit_learns(form):
    "Features, weights, folds, strength and prediction at no length difference, built anew."  # item 98
    rows, hard = random_annotations(60)
    gamed = gamed_rows(hard) if form == "v1" else None
    got = length_controlled_win_rate(rows, form, gamed)
    delta = np.array([len(r["output_2"]) - len(r["output_1"]) for r in rows])
    X, y, weights = np.stack([np.tanh(delta/delta.std(ddof=1)), np.ones(60)], 1), np.array([r["preference"] - 1 for r in rows]), np.ones(60)
    if form == "v1":
        X = np.concatenate([[[-math.tanh(g["std_delta_len"]), g["instruction_difficulty"], 0] for g in gamed], np.insert(X, 1, hard, axis=1)])
        y, weights = np.concatenate([[g["preference"] for g in gamed], y]), np.concatenate([[0.1]*120, weights])
    w = by_scikit_learn(X, y, weights)
    assert list(got["coefficients"].values()) == pytest.approx(w.tolist(), abs=1e-4)
    equal = 1/(1 + np.exp(-(w[-1] + (w[1]*hard if form == "v1" else 0*hard))))
    assert got["length_controlled_winrate"] == pytest.approx(100*equal.mean(), abs=2e-3)
    assert got["lc_standard_error"] == pytest.approx(100*equal.std(ddof=1)/math.sqrt(60), abs=2e-3)
    assert got["win_rate"] == pytest.approx(100*np.mean([r["preference"] - 1 for r in rows]))


def test_the_baseline_against_itself_is_50():  # item 98
    texts = ["b"*k for k in range(1, 31)]
    noisy = annotations(outputs("base", texts), outputs("base", texts), [1.0]*20 + [0.0]*10)
    assert length_controlled_win_rate(noisy)["length_controlled_winrate"] == 50
    copy = length_controlled_win_rate(annotations(outputs("copy", texts), outputs("base", texts), [0.5]*30))
    assert copy["length_controlled_winrate"] == 50 and copy["coefficients"] == {"length": 0, "model": 0}
    hard = np.linspace(-1, 1, 30)
    assert math.isfinite(length_controlled_win_rate(annotations(outputs("copy", texts), outputs("base", texts), [0.5]*30), "v1", gamed_rows(hard))["length_controlled_winrate"])


def test_misaligned_outputs_raise():
    "What ends as NaN elsewhere: other instructions, one twice, no verdicts, an unknown index, no rows."  # item 98
    ours, base = outputs("ours", ["a"]*6), outputs("base", ["b"]*6)
    for o, b, s in ((ours, base[:5], [1]*6), (ours[:5] + ours[:1], base, [1]*6), (ours, base, [1]*5), ([], [], []), ([dict(r, instruction=r["instruction"] + " ") for r in ours], base, [1]*6)):
        with pytest.raises(ValueError, match="same instructions"): annotations(o, b, s)
    rows = annotations(ours, base, [NAN]*6)
    for call in (win_rate, length_controlled_win_rate):
        with pytest.raises(ValueError, match="no row has a preference"): call(rows)
        with pytest.raises(ValueError, match="no row has a preference"): call([])
    rows = annotations(ours, base, [1.0]*6)
    with pytest.raises(ValueError, match="row 2 has preference 3"): win_rate(rows[:2] + [dict(rows[2], preference=3)])
    with pytest.raises(ValueError, match="instruction 5 isn't in"): length_controlled_win_rate(rows, "v1", gamed_rows([0.1]*5))
    with pytest.raises(ValueError, match="needs `gamed`"): length_controlled_win_rate(rows, "v1")
    with pytest.raises(ValueError, match="takes no"): length_controlled_win_rate(rows, "minimal", gamed_rows([0.1]*6))
    with pytest.raises(ValueError, match="row 1 of `gamed`"): length_controlled_win_rate(rows, "v1", [{**gamed_rows([0.1])[0]}, {"index": 1}])
    with pytest.raises(ValueError, match="several models"): length_controlled_win_rate(rows[:5] + [dict(rows[5], generator_2="other")])
    with pytest.raises(ValueError, match="5 folds need 5"): length_controlled_win_rate(rows[:4])
    with pytest.raises(ValueError, match="row 1 has no 'preference'"): win_rate([rows[0], {"index": 1}])
    with pytest.raises(ValueError, match="row 0 has no 'output_1'"): length_controlled_win_rate([{k: v for k, v in r.items() if k != "output_1"} for r in rows])


@pytest.fixture
def alpaca(monkeypatch, tmp_path):
    "alpaca-eval's module of the regression, its download replaced by a file; pkg_resources, which it imports, has left setuptools."
    monkeypatch.setitem(sys.modules, "pkg_resources", sys.modules.get("pkg_resources") or types.ModuleType("pkg_resources"))
    glm = pytest.importorskip("alpaca_eval.metrics.glm_winrate", exc_type=ImportError)
    monkeypatch.setattr(glm, "hf_hub_download", lambda **_: str(tmp_path/"df_gamed.csv"))
    return glm


@pytest.mark.slow
@pytest.mark.parametrize("unread", [0, 7])
@pytest.mark.parametrize("form", ["minimal", "v1"])
def test_parity_with_alpaca_eval(form, unread, alpaca, tmp_path):
    "Win rate and counts exactly; the length-controlled rate to what liblinear's tolerance of 1e-4 leaves."
    import pandas as pd
    rows, hard = random_annotations(150, seed=3, unread=unread)
    rows[20]["preference"] = 0  # an older way to write a draw
    pd.DataFrame(gamed_rows(hard)).to_csv(tmp_path/"df_gamed.csv", index=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = alpaca.get_length_controlled_winrate(pd.DataFrame(rows), glm_name=f"length_controlled_{form}", save_weights_dir=None)
    got = length_controlled_win_rate(rows, form, tmp_path/"df_gamed.csv" if form == "v1" else None)
    for key in ("win_rate", "standard_error", "n_wins", "n_wins_base", "n_draws", "n_total", "discrete_win_rate"): assert got[key] == pytest.approx(float(theirs[key]), abs=1e-9), key
    assert got["n_unread"] == unread
    for key in ("length_controlled_winrate", "lc_standard_error"): assert got[key] == pytest.approx(float(theirs[key]), abs=0.05), key


@pytest.mark.slow
def test_letters_probabilities_equal_alpaca_evals_parser(alpaca, monkeypatch):
    from alpaca_eval.completion_parsers import logprob_parser
    tops = {"A": -0.3, "B": -1.7, "The": -2.0}
    monkeypatch.setenv("KEY", "k")
    with Stub(lambda request, i: completion("A", tops=tops)) as stub:
        share = Endpoint("m", (0, 0), base_url=stub.url, key_name="KEY").choose([[{"role": "user", "content": "?"}]], ("A", "B"))[0]
    theirs = logprob_parser({"logprobs": {"content": [{"top_logprobs": [{"token": t, "logprob": lp} for t, lp in tops.items()]}]}}, "A", ["A", "B"], is_binarize=False, log_prob_index=0)[0]
    assert min(abs(share[0] - (theirs - 1)), abs(share[1] - (theirs - 1))) < 1e-9


# --- liking one's own, two turns, five labels ------------------------------------------------------------
def test_self_preference_is_found_and_nothing_else():
    "Generosity, quality and noise-free likings are set; each is found exactly, whatever the rest."
    own, generous, good = {"p": 0.7, "q": -0.2, "r": 0.0}, {"p": 2.0, "q": 0.0, "r": -1.0, "human": 5.0}, {"p": 0.5, "q": 3.0, "r": 1.0}
    for judges in (["p", "q", "r"], ["p", "q", "r", "human"], ["p", "human"]):
        authors = ["p", "q", "r"]
        scores = {(j, a): np.array([generous[j] + good[a] + (own[j] if j == a else 0)]*3) + np.arange(3) for j in judges for a in authors}
        got = self_preference(scores)
        assert list(got) == [j for j in judges if j != "human"] and all(np.allclose(x, own[j]) and x.shape == (3,) for j, x in got.items())


def test_self_preference_says_where_it_cannot_be_told():
    with pytest.raises(ValueError, match="Add a judge who is no author"): self_preference({(j, a): [1.0] for j in "pq" for a in "pq"})
    with pytest.raises(ValueError, match="Add a judge who is no author"): self_preference({("p", a): [1.0] for a in "qr"})
    with pytest.raises(ValueError, match="'p' has no scores for 'q'"): self_preference({("p", "p"): [1.0], ("human", "p"): [1.0], ("human", "q"): [1.0]})


QUESTIONS = [{"question_id": 7, "category": "roleplay", "turns": ["one", "two"]}, {"question_id": 9, "category": "coding", "turns": ["three", "four"], "reference": ["r3", "r4"]},
             {"question_id": 8, "category": "haiku", "turns": ["five", "six"]}]


def test_mt_bench_rows_are_fastchats():
    def echo(chats, temperature): return [f"{temperature}|" + "/".join(m["content"] for m in c) for c in chats]
    answers = mt_answers(echo, QUESTIONS, "m")
    assert answers[1] == {"question_id": 9, "model_id": "m", "choices": [{"index": 0, "turns": ["0.0|three", "0.0|three/0.0|three/four"]}]}
    assert answers[0]["choices"][0]["turns"] == ["0.7|one", "0.7|one/0.7|one/two"] and answers[2]["choices"][0]["turns"][0] == "0.7|five"
    judged = mt_judge(lambda chats: ["[[8]]", "[[4]]", "[[6]]", "no", "[[2]]", "[[1]]"], QUESTIONS, answers, name="stub")
    assert [(r["question_id"], r["turn"], r["score"]) for r in judged] == [(7, 1, 8), (7, 2, 4), (9, 1, 6), (9, 2, -1), (8, 1, 2), (8, 2, 1)]
    assert set(judged[0]) >= {"question_id", "model", "judge", "user_prompt", "judgment", "score", "turn"} and judged[0]["judge"] == ["stub", "single"]
    assert "r3" in judged[2]["user_prompt"] and "r4" not in judged[2]["user_prompt"] and "r4" in judged[3]["user_prompt"] and "user: three" in judged[3]["user_prompt"]
    scores = mt_scores(judged, QUESTIONS)["m"]
    assert scores == {"score": 21/5, "first turn": 16/3, "second turn": 2.5, "n": 6, "unread": 1, "roleplay": 6, "coding": 6, "haiku": 1.5}


def test_mt_bench_refuses_what_it_cannot_judge():
    with pytest.raises(ValueError, match=r"question 1 \(math\) needs `reference`"): mt_answers(lambda c, temperature: c, [{"question_id": 1, "category": "math", "turns": ["a", "b"]}], "m")
    with pytest.raises(ValueError, match="question 0 needs question_id"): mt_answers(lambda c, temperature: c, [{"question_id": 1, "category": "stem", "turns": ["a"]}], "m")
    with pytest.raises(ValueError, match="answers question 5"): mt_judge(lambda c: c, QUESTIONS, [{"question_id": 5, "model_id": "m", "choices": [{"turns": ["a", "b"]}]}])


def test_arena_hard_is_bradley_terry_against_one_baseline():
    "The share equals the strength that an unpenalised logistic regression finds for the model over its baseline."
    from sklearn.linear_model import LogisticRegression
    labels = ["A>>B", "A>B", "A=B", "B>A", "B>>A"]
    r = np.random.default_rng(2)
    first, second = ([f"because. [[{labels[k]}]]" for k in r.integers(0, 5, 40)] for _ in range(2))
    got = arena_hard_score(first + ["[[A>B]] [[B>A]]"], second + [None])
    assert (got["n"], got["unread"]) == (80, 2)
    weight = {"A>>B": (3, 0), "A>B": (1, 0), "A=B": (0.5, 0.5), "B>A": (0, 1), "B>>A": (0, 3)}
    won, lost = (sum(weight[t.split("[[")[1][:-2]][k] for t in first) + sum(weight[t.split("[[")[1][:-2]][1 - k] for t in second) for k in (0, 1))
    fit = LogisticRegression(C=1e8, fit_intercept=False, tol=1e-10).fit([[1.0], [1.0]], [1, 0], sample_weight=[won, lost])
    assert got["win_rate"] == pytest.approx(100/(1 + math.exp(-fit.coef_[0, 0])), abs=1e-4)
    with pytest.raises(ValueError, match="none of the 2 texts"): arena_hard_score(["A"], ["B"])


# --- an endpoint -----------------------------------------------------------------------------------------
CHATS = [[{"role": "user", "content": f"Which? {i}"}] for i in range(6)]


@pytest.fixture
def connect(monkeypatch):
    "Endpoint at a stub, with a key in the environment; waits are noted, not waited."
    pytest.importorskip("openai")
    monkeypatch.setenv("STUB_KEY", "sk-secret")
    def make(stub, **settings):
        waited = []
        endpoint = Endpoint("m", **{"usd_per_million": (10.0, 20.0), "base_url": stub.url, "key_name": "STUB_KEY", "sleep": waited.append, "timeout": 30.0, **settings})
        endpoint.waited = waited
        return endpoint
    return make


def test_texts_come_in_order_and_cost_what_was_used(connect):
    with Stub(lambda request, i: completion(f"said {request['messages'][0]['content']}")) as stub:
        judge = connect(stub)
        assert judge(CHATS) == [f"said Which? {i}" for i in range(6)]
    assert judge.spent_usd == pytest.approx(6*(100*10 + 10*20)/1e6) and judge.counts["answered"] == 6
    assert set(stub.keys) == {"Bearer sk-secret"} and stub.requests[0] | {"messages": 0} == {"model": "m", "messages": 0, "max_tokens": 1024, "temperature": 0.0}


FAULTS = {"429": (429, {"error": {"message": "slow down"}}, {"retry-after": "7"}, 0), "500": (500, {"error": {"message": "oh"}}, {}, 0), "503": (503, b"<html>busy", {"content-type": "text/html"}, 0),
          "malformed": (200, b'{"choices": [{"mess', {}, 0), "no choices": (200, {"id": "x", "choices": []}, {}, 0), "an error as 200": (200, {"error": {"message": "oh"}}, {}, 0),
          "plain text": (200, b"ok", {"content-type": "text/plain"}, 0), "parts for a text": (200, completion([{"type": "text", "text": "[[A]]"}]), {}, 0)}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_passes(name, connect):
    "Two faults, then an answer: one text, two waits, the second longer; a server that says how long is believed."
    with Stub(lambda request, i: FAULTS[name] if i < 2 else completion("fine")) as stub:
        judge = connect(stub)
        assert judge(CHATS[:1]) == ["fine"] and len(stub.requests) == 3 and judge.counts["answered"] == 1
    assert judge.waited == [7, 7] if name == "429" else 0.5 <= judge.waited[0] <= 1 <= judge.waited[1] <= 2


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_stays_is_unread_and_the_run_goes_on(name, connect):
    with Stub(lambda request, i: FAULTS[name] if "2" in request["messages"][0]["content"] else completion("[[A]]")) as stub:
        judge = connect(stub, n_retries=2)
        assert judge(CHATS) == ["[[A]]"]*2 + [None] + ["[[A]]"]*3 and len(stub.requests) == 5 + 3
    assert judge.counts["answered"] == 5 and sum(judge.counts.values()) == 8 and len(judge.waited) == 2


def test_a_time_out_is_tried_again_and_counts_in_full(connect):
    with Stub(lambda request, i: (200, completion(), {}, 2.5) if i == 0 else completion()) as stub:
        judge = connect(stub, timeout=1.0, max_tokens=1000)
        assert judge(CHATS[:1]) == ["[[A]]"] and judge.counts["time-out"] == len(stub.requests) - 1 >= 1
    worst = ((len("Which? 0") + 16)*10 + 1000*20)/1e6
    assert judge.spent_usd == pytest.approx(judge.counts["time-out"]*worst + (100*10 + 10*20)/1e6)


@pytest.mark.parametrize("body, why", [(completion(None, refusal="I can't"), "refused"), (completion("[[", finish="content_filter"), "refused"), (completion(""), "empty"), (completion(None), "empty")])
def test_refusals_are_no_verdicts(body, why, connect, tmp_path):
    with Stub(lambda request, i: body) as stub:
        judge = connect(stub, cache=tmp_path/"c.jsonl")
        assert judge(CHATS[:1]) == [None] == judge(CHATS[:1]) and judge.counts[why] == (1 if why == "refused" else 2)  # a refusal is an answer, and kept
        assert len(stub.requests) == (1 if why == "refused" else 2)


def test_a_reply_that_was_cut_off_is_counted(connect):
    with Stub(lambda request, i: completion("Let me think", finish="length")) as stub:
        judge = connect(stub)
        assert judge(CHATS[:1]) == ["Let me think"] and judge.counts["cut off"] == 1


@pytest.mark.parametrize("status, error, words", [(401, {"message": "sk-secret is wrong"}, "check the key in STUB_KEY"), (404, {"message": "?"}, "no such model"), (429, {"message": "?", "code": "insufficient_quota"}, "no credit")])
def test_what_waiting_cannot_help_stops_the_run(status, error, words, connect, tmp_path):
    "Answers before it are kept, the key is never shown, nothing is asked twice."
    with Stub(lambda request, i: completion() if i == 0 else (status, {"error": error}, {}, 0)) as stub:
        judge = connect(stub, n_parallel=1, cache=tmp_path/"c.jsonl")
        with pytest.raises(RuntimeError, match=words) as caught: judge(CHATS)
        assert "sk-secret" not in str(caught.value) and len(stub.requests) <= 6 and not judge.waited
        assert len((tmp_path/"c.jsonl").read_text().splitlines()) == 1 and judge.spent_usd == pytest.approx(0.0012)


def test_a_bad_request_concerns_its_row_only(connect):
    with Stub(lambda request, i: (400, {"error": {"message": "too long"}}, {}, 0) if "3" in request["messages"][0]["content"] else completion()) as stub:
        assert connect(stub)(CHATS).count(None) == 1 and len(stub.requests) == 6


def test_the_cap_stops_before_asking(connect, tmp_path):
    "One request can cost (24 x 10 + 1000 x 20)/1e6 = 0.02024 and does cost 0.0012: under 0.0215 two may be asked, not three."
    with Stub(lambda request, i: completion()) as stub:
        judge = connect(stub, cap_usd=0.0215, max_tokens=1000, n_parallel=1, cache=tmp_path/"c.jsonl")
        with pytest.raises(CostCap, match="0.0024 of 0.0215"): judge(CHATS)
        assert len(stub.requests) == 2 and judge.spent_usd == pytest.approx(0.0024)
        assert connect(stub, cap_usd=0, cache=tmp_path/"c.jsonl", max_tokens=1000)(CHATS[:2]) == ["[[A]]"]*2 and len(stub.requests) == 2
        assert connect(stub, usd_per_million=(0, 0), cap_usd=0)(CHATS[:1]) == ["[[A]]"]


def test_requests_at_the_same_time_keep_the_cap_too(connect):
    "Six at a time under a cap with room for two: what is on its way counts at its worst."
    with Stub(lambda request, i: (200, completion(), {}, 0.5)) as stub:
        judge = connect(stub, cap_usd=0.041, max_tokens=1000, n_parallel=6)
        with pytest.raises(CostCap): judge(CHATS)
        assert len(stub.requests) == 2 and judge.spent_usd == pytest.approx(0.0024)


def test_a_repeated_run_costs_nothing(connect, tmp_path):
    "The cache serves another object, a file with a torn end, and like questions of one run; another model, server or setting is asked."
    path = tmp_path/"deep"/"c.jsonl"
    with Stub(lambda request, i: completion(f"reply {i}")) as stub:
        first = connect(stub, cache=path, n_parallel=1)(CHATS[:3] + CHATS[:1])
        assert first == ["reply 0", "reply 1", "reply 2", "reply 0"] and len(stub.requests) == 3
        path.write_bytes(path.read_bytes() + b'{"key": "torn", "reply": {"te')
        again = connect(stub, cache=path)
        assert again(CHATS[:4]) == first[:3] + ["reply 3"] and (again.counts["cached"], again.counts["answered"]) == (3, 1)
        assert again.spent_usd == pytest.approx(0.0012) and connect(stub, cache=path)(CHATS[:4]) == first[:3] + ["reply 3"] and len(stub.requests) == 4
        assert connect(stub, cache=path, max_tokens=5)(CHATS[:1]) == ["reply 4"]
        assert "sk-secret" not in path.read_text()
        with Stub(lambda request, i: completion("another server")) as other: assert connect(other, cache=path)(CHATS[:1]) == ["another server"]


def test_a_file_that_is_no_cache_is_left_alone(connect, tmp_path):
    (tmp_path/"data.jsonl").write_text('{"prompt": "mine"}\n')
    with Stub(lambda request, i: completion()) as stub:
        with pytest.raises(ValueError, match="data.jsonl isn't a cache"): connect(stub, cache=tmp_path/"data.jsonl")
        with pytest.raises(ValueError, match="must end in .jsonl"): connect(stub, cache=tmp_path/"data.csv")
    assert (tmp_path/"data.jsonl").read_text() == '{"prompt": "mine"}\n'


def test_probabilities_of_the_letters(connect):
    tops = [{"A": math.log(0.6), " B": math.log(0.1), "B": math.log(0.1), "The": math.log(0.2)}, {"The": -0.1}, {"B": -0.1}]
    with Stub(lambda request, i: completion("x", tops=tops[i], finish="length")) as stub:
        judge = connect(stub, n_parallel=1)
        assert np.allclose(judge.choose(CHATS[:3], ("A", "B")), [[0.75, 0.25], [NAN, NAN], [0, 1]], equal_nan=True)
    assert stub.requests[0]["logprobs"] is True and stub.requests[0]["max_tokens"] == 1 and judge.counts["cut off"] == 0


def test_settings_for_other_servers(connect):
    with Stub(lambda request, i: completion(usage=None)) as stub:
        judge = connect(stub, tokens_field="max_completion_tokens", temperature=None, max_tokens=50)
        judge(CHATS[:1])
        assert stub.requests[0] == {"model": "m", "messages": CHATS[0], "max_completion_tokens": 50}
        assert judge.spent_usd == pytest.approx((24*10 + 50*20)/1e6)  # the server doesn't say what was used


def test_without_a_key_or_the_package(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match="OPENAI_API_KEY"): Endpoint("m", (1, 1))
    with pytest.raises(ValueError, match="can't be below 0"): Endpoint("m", (-1, 1), base_url="http://127.0.0.1:9/v1")
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"ftcourse\[eval\]"): Endpoint("m", (1, 1))


# --- a local model ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tiny():
    from ftcourse.models import load
    return load("tiny")


def test_a_local_judges_probabilities_are_its_logits(tiny):
    "Each question alone in one plain row; several at a time and in another order give the same."  # item 96
    import torch
    from ftcourse.tokens import apply_template
    model, tokenizer = tiny
    chats = [[{"role": "user", "content": "Which? " + "word "*k}] for k in (1, 30, 5, 60)]
    ids = [tokenizer(x, add_special_tokens=False)["input_ids"] for x in ("A", "B")]
    want = []
    for chat in chats:
        prompt = apply_template(tokenizer, chat, add_generation_prompt=True)
        with torch.no_grad(): logps = [sum(model(torch.tensor([prompt + t])).logits[0, len(prompt) + k - 1].log_softmax(-1)[t[k]] for k in range(len(t))) for t in ids]
        want.append(torch.stack(logps).softmax(-1).numpy())
    for size in (1, 3, 4): assert np.allclose(LocalJudge(model, tokenizer, batch_size=size).choose(chats, ("A", "B")), want, atol=1e-5)
    assert np.allclose(LocalJudge(model, tokenizer).choose(chats[::-1], ("B", "A")), np.array(want)[::-1, ::-1], atol=1e-5)
    found = judge_pairs(LocalJudge(model, tokenizer), ROWS, ["yes"]*4, ["no"]*4, weighted=True)
    assert np.isfinite(found.scores).all() and found.weighted


def test_a_local_judge_writes_and_says_what_is_too_long(tiny):
    model, tokenizer = tiny
    judge = LocalJudge(model, tokenizer, max_tokens=4)
    assert [type(t) for t in judge(CHATS[:2])] == [str, str]
    with pytest.raises(ValueError, match="question 1 has"): judge.choose([CHATS[0], [{"role": "user", "content": "word "*20_000}]], ("A", "B"))


