"""Metrics against the field's own tools, on random and awkward texts: sacrebleu, rouge-score, NLTK, torchmetrics, scikit-learn, SciPy, evaluate, lm-eval."""
import itertools, json, math, os, random, re, shutil, subprocess, sys
from pathlib import Path

import numpy as np
import pytest

import ftcourse.evals.metrics as M
from ftcourse.evals.metrics import (PRF, WordNet, accuracy, bleu, bleu_counts, bleu_score, brier_score, calibration_bins, calibration_error, corpus_difference,
                                    corpus_interval, evaluate_compute, exact_match, matthews, meteor, normalize_answer, perplexities, porter_stem,
                                    precision_recall_f1, randomisation_test, rouge, strided_trees, task_completion, text_perplexity, text_scores, token_f1,
                                    tokens_13a, words_ascii, write_evaluate_modules)
from helpers import ROOT

AWKWARD = ["", " ", ".", "a", "The the THE", "cat", "on the mat.\nIt sat.", "3.14, 1,000 or 2019-20; re-enter -\nsplit", "He said: \"don't!\" &quot;x&quot; &amp;lt; <skipped>",
           "კატა ზის ხალიჩაზე, და ჩერდება.", "Η γάτα κάθεται στο χαλί· ωραία;", "«Ναι», είπε", "日本語 の テキスト。", "🙂 ok 🙂", "İstanbul ǅ ß K", "a\u00a0b\u200bc", "...", "x" * 40,
           "flies dying hopping agreed\tenjoyment skies", "-5 - 5-5 .5 5."]
WORDS = ("the a cat cats sat sits sitting mat house housing happily happy . , ; - 3.5 1,000 don't and on in running ran flies fly Paris PARIS relational generalli "
         "γάτα კატა naïve").split()


def texts(seed, n, longest=12):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randrange(longest + 1))) for _ in range(n)]


# every awkward text against some others, and random ones that share words
PAIRS = list(zip(AWKWARD, AWKWARD)) + [(a, AWKWARD[(3*i + 5) % len(AWKWARD)]) for i, a in enumerate(AWKWARD)] + list(zip(texts(1, 150), texts(2, 150)))


# --- labels ---------------------------------------------------------------------------------------------------
def test_labels_by_hand():
    labels, called = list("aaabbc"), list("aabbca")
    assert accuracy(called, labels) == 3/6
    assert matthews(called, labels) == pytest.approx((3*6 - (3*3 + 2*2 + 1))/(36 - (3*3 + 2*2 + 1)))
    assert accuracy(np.array([1, 0, 1]), np.array([1, 1, 1])) == precision_recall_f1(np.array([1, 0, 1]), np.array([1, 1, 1]), positive=1).recall == pytest.approx(2/3)
    assert precision_recall_f1(called, labels, positive="a") == PRF(2/3, 2/3, 2/3)
    assert precision_recall_f1(called, labels, positive="b") == PRF(1/2, 1/2, 1/2)
    assert precision_recall_f1(called, labels, positive="c") == PRF(0, 0, 0)
    assert precision_recall_f1(called, labels).f1 == pytest.approx((2/3 + 1/2 + 0)/3)
    assert precision_recall_f1(called, labels, "weighted").f1 == pytest.approx((3*2/3 + 2/2)/6)
    assert precision_recall_f1(called, labels, "micro").f1 == pytest.approx(3/6)
    assert precision_recall_f1(["?", "a"], ["a", "a"]).f1 == pytest.approx(1/3) and precision_recall_f1(["?", "a"], ["a", "a"], classes=["a"]).f1 == pytest.approx(2/3)


@pytest.mark.parametrize("n_classes", [2, 3, 5])
def test_labels_equal_scikit_learns(n_classes):
    from sklearn.metrics import accuracy_score, matthews_corrcoef, precision_recall_fscore_support
    for seed in range(20):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, n_classes, 12).tolist()
        called = np.where(rng.random(12) < 0.4, labels, rng.integers(0, n_classes + 1, 12)).tolist() # one class that is never right
        assert accuracy(called, labels) == accuracy_score(labels, called)
        assert matthews(called, labels) == pytest.approx(matthews_corrcoef(labels, called))
        for average in ("macro", "weighted", "micro"):
            want = precision_recall_fscore_support(labels, called, average=average, zero_division=0)[:3]
            assert precision_recall_f1(called, labels, average) == pytest.approx(want)
            want = precision_recall_fscore_support(labels, called, labels=[0, 1], average=average, zero_division=0)[:3]
            if 0 in labels or 1 in labels: assert precision_recall_f1(called, labels, average, classes=[0, 1]) == pytest.approx(want)
        want = precision_recall_fscore_support(labels, called, labels=[1], average="macro", zero_division=0)[:3]
        assert precision_recall_f1(called, labels, positive=1) == pytest.approx(want)


def test_token_accuracy_is_scikit_learns():
    import torch
    from sklearn.metrics import accuracy_score
    from ftcourse.tune.loop import token_accuracy
    gen = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(3, 9, 4, generator=gen), torch.randint(0, 4, (3, 9), generator=gen)
    labels[:, :4] = -100
    assert float(token_accuracy(logits, labels)) == pytest.approx(accuracy_score(labels[:, 4:].flatten(), logits[:, 3:-1].argmax(-1).flatten()))


# --- short answers --------------------------------------------------------------------------------------------
def test_squad_equals_torchmetrics():
    from torchmetrics.functional.text import squad
    for i, (p, r) in enumerate(PAIRS):
        refs = [r, *AWKWARD[i % 5:i % 5 + 2]] if i % 2 else [r]
        want = squad([{"prediction_text": p, "id": "1"}], [{"answers": {"answer_start": [0]*len(refs), "text": refs}, "id": "1"}])
        assert 100*exact_match(p, refs) == pytest.approx(float(want["exact_match"])), (p, refs)
        assert 100*token_f1(p, refs) == pytest.approx(float(want["f1"]), abs=1e-4), (p, refs)


def test_squad_by_hand():
    assert normalize_answer("The  Cat, an A-team.") == "cat ateam"
    assert exact_match("The Cat", "cat!") == 1 and exact_match("The Cat", "cat!", normalize=str) == 0
    assert token_f1("b b c", "b d") == pytest.approx(2*(1/3)*(1/2)/(1/3 + 1/2)) and token_f1("the", "") == 1 and token_f1("x", ["y", "x z"]) == pytest.approx(2/3)


def test_task_completion_by_hand():
    has = lambda word: (lambda answer: word in answer)
    done, rules = task_completion(["a b", "a", ""], [{"A": has("a"), "B": has("b")}, {"A": has("a"), "B": has("b")}, {"A": has("a")}])
    assert done.tolist() == [1, 0, 0] and rules == {"A": pytest.approx(2/3), "B": 1/2}
    with pytest.raises(ValueError, match="task 1 has no rules"): task_completion(["a", "b"], [{"A": has("a")}, {}])


# --- BLEU -----------------------------------------------------------------------------------------------------
def test_tokens_equal_sacrebleus_13a():
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    theirs = Tokenizer13a()
    for text in AWKWARD + texts(3, 50) + ["".join(random.Random(i).choices("ab1 .,-'\"&;/()[]{}<>\n", k=25)) for i in range(300)]:
        assert tokens_13a(text) == theirs(text.rstrip()).split(), text


@pytest.mark.parametrize("smooth, value", [("exp", None), ("floor", None), ("floor", 0.3), ("add-k", None), ("add-k", 2), ("none", None)])
@pytest.mark.parametrize("effective", [False, True])
def test_sentence_bleu_equals_sacrebleus(smooth, value, effective):
    from sacrebleu.metrics import BLEU
    theirs = BLEU(smooth_method=smooth, smooth_value=value, effective_order=effective)
    for i, (p, r) in enumerate(PAIRS):
        refs = [r, *texts(i, 2)] if i % 3 == 0 else [r]
        assert bleu([p], [refs], smooth=smooth, smooth_value=value, effective_order=effective) == pytest.approx(theirs.corpus_score([p], [[x] for x in refs]).score, abs=1e-9), (p, refs)


@pytest.mark.parametrize("options, ours", [({}, {}), (dict(lowercase=True), dict(tokenize=lambda t: tokens_13a(t.lower()))), (dict(tokenize="none"), dict(tokenize=str.split)),
                                           (dict(tokenize="char"), dict(tokenize=lambda t: [c for c in t if not c.isspace()])), (dict(max_ngram_order=2), dict(max_n=2))])
def test_corpus_bleu_equals_sacrebleus(options, ours):
    from sacrebleu.metrics import BLEU
    p, first, second = texts(11, 60), texts(12, 60), texts(13, 60)
    assert bleu(p, list(zip(first, second)), **ours) == pytest.approx(BLEU(**options).corpus_score(p, [first, second]).score, abs=1e-9)
    assert bleu(AWKWARD, AWKWARD, **ours) == pytest.approx(100)


def test_bleu_clips_by_the_reference_that_has_most_and_takes_the_nearest_length():
    assert bleu_counts("a a a", ["a b", "a a b b"]).tolist() == [3, 2, 2, 1, 0, 0, 3, 2, 1, 0] # 2 and 4 are as near to 3: the shorter
    assert bleu_score([3, 6, 3, 2, 1, 0, 3, 2, 1, 0], effective_order=True) == pytest.approx(100*math.exp(-1)) and bleu_score([3, 6, 3, 2, 1, 0, 3, 2, 1, 0]) == 0


# --- ROUGE ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stem", [False, True])
def test_rouge_equals_rouge_scores(stem):
    from rouge_score.rouge_scorer import RougeScorer
    kinds = ["rouge1", "rouge2", "rouge3", "rougeL", "rougeLsum"]
    theirs = RougeScorer(kinds, use_stemmer=stem)
    draw = random.Random(5)
    lines = ["\n".join(draw.sample(texts(i, 6, 8), draw.randrange(1, 5))) for i in range(80)]
    for i, (p, r) in enumerate(PAIRS + list(zip(lines, lines[1:]))):
        refs = [r, AWKWARD[i % len(AWKWARD)], *texts(i, 1)] if i % 4 == 0 else [r]
        got, want = rouge(p, refs, kinds, words=lambda t: words_ascii(t, stem)), theirs.score_multi(refs, p)
        for k in kinds: assert got[k] == pytest.approx(tuple(want[k])), (k, p, refs)


def test_rouge_by_hand():
    got = rouge("the gunman kill police", "police killed the gunman")
    assert got["rouge1"] == PRF(3/4, 3/4, 3/4) and got["rouge2"] == PRF(1/3, 1/3, pytest.approx(1/3)) and got["rougeL"] == PRF(1/2, 1/2, 1/2)
    # Lin's example of the union: w1 w2 w3 w4 w5 against "w1 w2 w6 w7 w8" and "w1 w3 w8 w9 w5": w1 w2 w3 w5, 4 of 5
    assert rouge("w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", ["rougeLsum"])["rougeLsum"].recall == 4/5
    assert rouge("γάτα", "γάτα")["rouge1"].f1 == 0 and rouge("γάτα", "γάτα", words=str.split)["rouge1"].f1 == 1


# --- METEOR ---------------------------------------------------------------------------------------------------
def english_words():
    "Words of the course's own chapters, for every rule of the stemmer."
    found = set()
    for f in (ROOT / "ftcourse").rglob("*.py"): found |= set(re.findall("[a-z]{1,}", f.read_text(encoding="utf-8").lower()))
    return sorted(found)


def test_stems_equal_nltks():
    from nltk.stem.porter import PorterStemmer
    theirs = PorterStemmer()
    endings = ("s ies ied eed ed ing y ational tional enci anci izer bli alli entli eli ousli ization ation ator alism iveness fulness ousness aliti iviti biliti fulli logi icate "
               "ative alize iciti ical ful ness al ance ence er ic able ible ant ement ment ent ion sion tion ou ism ate iti ous ive ize e ll lle ying yed").split()
    made = [stem + e for stem in "a b y by ay hop fil fall fizz at bl siz tr oat trouble gener rel oper sky ab cry x yy toy theo syll".split() for e in endings]
    odd = ["", "é", "naïve", "ΓΆΤΑ", "კატა", "123ing", "yyyying", "Skies", "dying", "proceed", "innings"]
    for word in english_words() + made + odd: assert porter_stem(word) == theirs.stem(word), word


class NoWordNet:
    "A dictionary that knows no synonyms."
    def synsets(self, word): return []


def test_meteor_equals_nltks_without_synonyms():
    from nltk.translate.meteor_score import meteor_score
    for i, (p, r) in enumerate(PAIRS):
        refs = [r, *texts(i, 1)] if i % 3 == 0 else [r]
        assert meteor(p, refs) == pytest.approx(meteor_score([tokens_13a(x) for x in refs], tokens_13a(p), wordnet=NoWordNet()), abs=1e-12), (p, refs)
    p, r = "it is a guide to action which ensures", "it is the guide to actions that ensure"
    want = meteor_score([r.split()], p.split(), wordnet=NoWordNet(), alpha=0.8, beta=2, gamma=0.4)
    assert meteor(p, r, tokenize=str.split, alpha=0.8, beta=2, gamma=0.4) == pytest.approx(want)


LEXNAMES = "".join(f"{i:02d}\tname{i}\t1\n" for i in range(45))


def small_wordnet(folder):
    "WordNet's file format with a few meanings: nouns car/auto/motor_car, auto/machine, foot; verbs start/begin; adjective big/large(p); adverb quick/fast."
    meanings = {"noun": [("n", ["car", "auto", "motor_car"]), ("n", ["auto", "machine", "Auto"]), ("n", ["foot", "base"])], "verb": [("v", ["start", "begin"]), ("v", ["like", "love"])],
                "adj": [("a", ["big", "large(p)"])], "adv": [("r", ["quick", "fast"])]}
    exceptions = {"noun": "feet foot\n", "verb": "began begin\n", "adj": "", "adv": ""}
    for part, sets in meanings.items():
        data, places = "  1 licence\n", {}
        for kind, words in sets:
            for w in words: places.setdefault(w.lower().replace("(p)", ""), []).append(f"{len(data):08d}")
            data += f"{len(data):08d} 03 {kind} {len(words):02x} {' '.join(f'{w} 0' for w in words)} 000 {'00 ' if kind == 'v' else ''}| a meaning  \n"
        (folder / f"data.{part}").write_text(data)
        index = "".join(f"{w} {sets[0][0]} {len(p)} 1 @ {len(p)} 0 {' '.join(p)}  \n" for w, p in sorted(places.items()))
        (folder / f"index.{part}").write_text("  1 licence\n" + index)
        (folder / f"{part}.exc").write_text(exceptions[part])
    (folder / "lexnames").write_text(LEXNAMES)
    return folder


def nltk_wordnet(folder, monkeypatch):
    "NLTK's reader of a folder, which it opens only where its data may be."
    import nltk, warnings
    from nltk.corpus.reader.wordnet import WordNetCorpusReader
    monkeypatch.setattr(nltk.data, "path", [*nltk.data.path, str(folder)])
    monkeypatch.setattr(WordNetCorpusReader, "map_wn", lambda self: None) # it would look for a second WordNet, to translate to
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return WordNetCorpusReader(str(folder), None)


def nltk_words(reader, word): return {lemma.name() for s in reader.synsets(word) for lemma in s.lemmas() if "_" not in lemma.name()}


def test_synonyms_equal_nltks_reader(tmp_path, monkeypatch):
    ours, theirs = WordNet(small_wordnet(tmp_path)), nltk_wordnet(tmp_path, monkeypatch)
    assert ours("auto") == {"car", "auto", "machine", "Auto"} and ours("feet") == {"foot", "base"} and ours("larger") == {"big", "large"} and ours("nothing") == set()
    for word in "car cars auto AUTOS machine machines foot feet foots start started starting begin began begins big bigger biggest large larger quick fast like liking loves men".split():
        assert ours(word) == nltk_words(theirs, word), word


def test_meteor_with_synonyms(tmp_path, monkeypatch):
    from nltk.translate.meteor_score import meteor_score
    ours, theirs = WordNet(small_wordnet(tmp_path)), nltk_wordnet(tmp_path, monkeypatch)
    for p, r in [("the fast auto", "the quick car"), ("a fast car", "auto quick a"), ("foot foot big", "base big base"), ("auto auto car", "car auto x")]: # each is its own stem
        assert meteor(p, r, ours) == pytest.approx(meteor_score([r.split()], p.split(), wordnet=theirs), abs=1e-12), (p, r)
    assert meteor("the fast auto", "the quick car", ours) == pytest.approx(1 - 0.5/27) and meteor("the fast auto", "the quick car") < 0.4
    # NLTK asks for the synonyms of the stem "machin"; the word itself has one
    assert meteor("machine", "auto", ours) == 0.5 and meteor_score([["auto"]], ["machine"], wordnet=theirs) == 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/usr/share/wordnet/index.noun").exists(), reason="needs Debian's wordnet-base")
def test_synonyms_of_the_real_wordnet_equal_nltks(tmp_path, monkeypatch):
    folder = shutil.copytree("/usr/share/wordnet", tmp_path / "wordnet")
    (folder / "lexnames").write_text(LEXNAMES) # Debian's package lacks it; NLTK wants it
    ours, theirs = WordNet(), nltk_wordnet(folder, monkeypatch)
    for word in english_words(): assert ours(word) == nltk_words(theirs, word), word


def test_no_wordnet_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="wordnet-base"): WordNet(tmp_path)


# --- metrics side by side -------------------------------------------------------------------------------------
def test_text_scores_on_odd_texts():
    for p, r in PAIRS:
        scores = text_scores(p, r)
        assert set(scores) == {"exact", "f1", "bleu", "rouge1", "rougeL", "meteor"} and all(0 <= v <= 1 for v in scores.values()), (p, r)
    same = text_scores("The cat sat on the mat.", "The cat sat on the mat.")
    assert same.pop("meteor") == pytest.approx(1 - 0.5/7**3) and all(v == pytest.approx(1) for v in same.values())


# --- intervals and tests --------------------------------------------------------------------------------------
def test_all_columns_draw_the_same_rows():
    "A column that is twice another one must stay so in every resample, and three rows have 27 resamples to list."
    counts = np.array([[1., 2., 5], [2, 4, 1], [7, 14, 0]])
    assert np.allclose(corpus_interval(counts, lambda c: 2*c[0] - c[1]), 0)
    listed = [counts[list(i)].sum(0) for i in itertools.product(range(3), repeat=3)]
    ratio = lambda c: c[0]/(1 + c[2])
    assert np.allclose(corpus_interval(counts, ratio, n=20_000, level=0.5), np.quantile(list(map(ratio, listed)), [0.25, 0.75], method="inverted_cdf"))
    assert corpus_difference(counts, counts, ratio) == (0, 0, 0)


def test_bleu_interval_equals_sacrebleus_bootstrap():
    from sacrebleu.metrics import BLEU
    p, r = texts(21, 80), [a if i % 3 else b for i, (a, b) in enumerate(zip(texts(21, 80), texts(22, 80)))]
    want = BLEU().corpus_score(p, [r], n_bootstrap=2000)._ci
    low, high = corpus_interval([bleu_counts(a, b) for a, b in zip(p, r)], n=2000)
    assert (high - low)/2 == pytest.approx(want, rel=0.1) and low < bleu(p, r) < high


def test_difference_is_paired():
    p, r = texts(21, 60), [a if i % 3 else b for i, (a, b) in enumerate(zip(texts(21, 60), texts(22, 60)))]
    a = [bleu_counts(x, y) for x, y in zip(p, r)]
    b = [bleu_counts(x.replace("cat", "dog"), y) for x, y in zip(p, r)]
    gap, low, high = corpus_difference(a, b)
    assert gap == pytest.approx(bleu(p, r) - bleu([x.replace("cat", "dog") for x in p], r)) and low <= gap <= high
    one = corpus_interval(a)
    assert high - low < one[1] - one[0] # the same rows: what is hard for both cancels


def test_randomisation_equals_scipys():
    from scipy.stats import permutation_test
    for seed in range(5):
        rng = np.random.default_rng(seed)
        a, b = rng.random(10), rng.random(10) - 0.2
        want = permutation_test((a, b), lambda x, y, axis=-1: np.abs((x - y).mean(axis)), permutation_type="samples", alternative="greater", vectorized=True, n_resamples=np.inf)
        assert randomisation_test(a, b) == pytest.approx(want.pvalue)
    a, b = rng.random(60), rng.random(60) - 0.1
    want = permutation_test((a, b), lambda x, y, axis=-1: np.abs((x - y).mean(axis)), permutation_type="samples", alternative="greater", vectorized=True, n_resamples=20_000, rng=1)
    assert randomisation_test(a, b) == pytest.approx(want.pvalue, abs=0.02)


def test_randomisation_of_a_corpus_score():
    "Every swap of four rows, listed."
    rng = np.random.default_rng(3)
    a, b = rng.integers(1, 9, (4, 2)), rng.integers(1, 9, (4, 2))
    score = lambda c: c[0]/c[1]
    gap = lambda s: abs(score(np.where(s, a, b).sum(0)) - score(np.where(s, b, a).sum(0)))
    gaps = [gap(np.array(s)[:, None]) for s in itertools.product((True, False), repeat=4)]
    assert randomisation_test(a, b, score) == np.mean(np.array(gaps) >= gaps[0] - 1e-12)


# --- perplexity -----------------------------------------------------------------------------------------------
def test_perplexities_by_hand():
    p = perplexities(-3*math.log(8), 3, ["ab  cd", "é"]) # three tokens of probability 1/8; three words; 8 bytes
    assert p == pytest.approx((8, 8, 8**(3/8), 9/8))
    assert perplexities(-1000., 500, ["日本" * 100])[:2] == (pytest.approx(math.e**2), math.inf)
    with pytest.raises(ValueError, match="0 words"): perplexities(-1., 3, ["  "])


@pytest.fixture(scope="module")
def tiny():
    import torch
    from ftcourse.models import load
    model, tokenizer = load("tiny")
    return model.to(torch.float32), tokenizer


LONG = "Windows overlap so that each token has some context, even the first of a block. " * 3


@pytest.mark.parametrize("max_len, stride", [(16, 15), (16, 8), (16, 1), (9, 4), (4096, 100)])
def test_windows_are_those_of_the_usual_loop(tiny, max_len, stride):
    "Hugging Face's guide to perplexity moves a window by `stride` and scores its last tokens, those behind the end of the one before."
    _, tokenizer = tiny
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ids = [start, *tokenizer(LONG, add_special_tokens=False)["input_ids"]]
    want, before = [], 1
    for begin in range(0, len(ids), stride):
        end = min(begin + max_len, len(ids))
        want.append((tuple(ids[begin:before]), tuple(ids[before:end])))
        before = end
        if end == len(ids): break
    got = strided_trees([LONG, LONG], tokenizer, max_len, stride)
    assert [(t.prompt_ids, t.replies[0]) for t in got] == want*2 and {t.row for t in got} == {0, 1}
    assert all(set(t.masks[0]) == {1} for t in got)


@pytest.mark.parametrize("stride", [15, 5])
def test_perplexity_is_that_of_plain_forward_passes(tiny, stride):
    import torch
    model, tokenizer = tiny
    ids = torch.tensor([tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id, *tokenizer(LONG, add_special_tokens=False)["input_ids"]])
    nats, before = 0., 1
    for begin in range(0, len(ids), stride):
        end = min(begin + 16, len(ids))
        with torch.no_grad(): logps = model(ids[None, begin:end]).logits[0].log_softmax(-1)
        nats -= sum(logps[i - 1 - begin, ids[i]].item() for i in range(before, end))
        before = end
        if end == len(ids): break
    got, n = text_perplexity(model, tokenizer, [LONG], 16, stride), len(ids) - 1
    assert got.token == pytest.approx(math.exp(nats/n), rel=1e-4)
    assert got.word == pytest.approx(math.exp(nats/len(LONG.split())), rel=1e-3) and got.bits_per_byte == pytest.approx(nats/math.log(2)/len(LONG), rel=1e-4)


@pytest.mark.slow
def test_blocks_are_lm_evals_rolling_windows(tiny):
    "With a stride of max_len - 1 every token is scored after the same tokens as in lm-eval, but in the last window, where it looks back further."
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    _, tokenizer = tiny
    ids = tokenizer(LONG, add_special_tokens=False)["input_ids"]
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    theirs = list(map(make_disjoint_window, get_rolling_token_windows(ids, start, max_seq_len=15, context_len=1)))
    ours = strided_trees([LONG], tokenizer, 16, 15)
    assert [list(t.replies[0]) for t in ours] == [reply for _, reply in theirs]
    assert [list(t.prompt_ids) for t in ours[:-1]] == [context for context, _ in theirs[:-1]]


# --- calibration ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n_bins", [1, 5, 15])
def test_calibration_equals_torchmetrics_and_scikit_learns(n_bins):
    import torch
    from sklearn.calibration import calibration_curve
    from sklearn.metrics import brier_score_loss
    from torchmetrics.functional.classification.calibration_error import _ce_compute
    rng = np.random.default_rng(n_bins)
    c = rng.random(300)
    y = rng.random(300) < c**2
    bounds = torch.linspace(0, 1, n_bins + 1, dtype=torch.float64)
    for norm in ("l1", "l2", "max"):
        want = _ce_compute(torch.tensor(c), torch.tensor(y, dtype=torch.float64), bounds, norm)
        assert calibration_error(c, y, n_bins, norm=norm) == pytest.approx(float(want), abs=1e-9)
    for equal, strategy in (("width", "uniform"), ("mass", "quantile")):
        right, said = calibration_curve(y, c, n_bins=n_bins, strategy=strategy)
        bins = calibration_bins(c, y, n_bins, equal)
        assert [b[0] for b in bins] == pytest.approx(said) and [b[1] for b in bins] == pytest.approx(right)
    assert brier_score(c, y) == pytest.approx(brier_score_loss(y, c))


def test_calibration_by_hand():
    assert calibration_bins([0.2, 0.2, 0.6, 1.0, 1.0], [0, 1, 1, 1, 0], 2) == [(pytest.approx(0.2), 0.5, 2), (pytest.approx(2.6/3), pytest.approx(2/3), 3)]
    assert calibration_bins([0.5], [1], 2) == [(0.5, 1., 1)] == calibration_bins([0.5], [1], 1)     # (a, b]
    assert calibration_error([.9]*6 + [.3]*2, [1, 1, 1, 0, 0, 0, 0, 0]) == pytest.approx((6*.4 + 2*.3)/8)
    assert calibration_error([1., 1.], [1, 1]) == 0 and calibration_error([0., 0.], [1, 1]) == 1
    assert [b[2] for b in calibration_bins(np.linspace(0, 1, 10), [1]*10, 3, "mass")] == [4, 3, 3]


# --- bad input ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("call, words", [
    (lambda: accuracy([1], [1, 2]), "1 predictions against 2"), (lambda: accuracy([], []), "no rows"), (lambda: bleu("a", "a"), "lists with one entry a row"),
    (lambda: bleu(["a"], [[]]), "one text or more"), (lambda: bleu(["a"], [[None]]), "one text or more"), (lambda: bleu(["a"], ["a"], smooth="ex"), "smooth='ex'"),
    (lambda: rouge("a", "a", ["rouge0"]), "no kind 'rouge0'"), (lambda: precision_recall_f1([1], [1], "mean"), "average='mean'"),
    (lambda: precision_recall_f1([1], [1], "weighted", classes=[2]), "classes \\[2\\]"), (lambda: token_f1("a", []), "one text or more"),
    (lambda: exact_match(None, "a"), "answer is None"), (lambda: bleu([None], ["a"]), "answer is None"),
    (lambda: calibration_error([80], [1]), "80.0 isn't between"), (lambda: calibration_error([float("nan")], [1]), "isn't between"), (lambda: calibration_error([.5], [1], norm="l3"), "norm='l3'"),
    (lambda: calibration_bins([.5], [1], 0), "n_bins=0"), (lambda: corpus_interval([1, 2]), "rows, k"), (lambda: perplexities(-1., 1, "text"), "one string"),
    (lambda: strided_trees(["a"], None, 8, 8), "stride=8"), (lambda: strided_trees("a", None), "one string"), (lambda: evaluate_compute("x", [1], [1]), "no metric 'x'")])
def test_bad_input_is_said(call, words):
    with pytest.raises(ValueError, match=words): call()


def test_an_empty_text_is_named(tiny):
    with pytest.raises(ValueError, match="text 1 is empty"): strided_trees(["a", ""], tiny[1])


def test_scoring_texts_needs_no_torch():
    code = "import sys, ftcourse.evals.metrics as m; m.text_scores('a cat', 'a cat'); print([x for x in ('torch', 'transformers', 'nltk') if x in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout.strip() == "[]"


# --- evaluate -------------------------------------------------------------------------------------------------
def test_written_scripts_are_complete(tmp_path):
    paths = write_evaluate_modules(tmp_path / "new")
    assert set(paths) == set(M._EVALUATE)
    for name, path in paths.items():
        compile((Path(path) / f"{name}.py").read_text(), name, "exec")
    got = evaluate_compute("rouge", ["a b", "c"], ["a b", "d"], kinds=["rouge1"])
    assert got == {"rouge1": 0.5} and evaluate_compute("bleu", ["a b c d"], ["a b c d"]) == {"bleu": pytest.approx(100)}


@pytest.mark.slow
def test_evaluate_loads_and_combines_them(tmp_path, monkeypatch):
    code = f"""
import evaluate, json, sys
sys.path.insert(0, {str(ROOT)!r})
from ftcourse.evals.metrics import write_evaluate_modules
paths = write_evaluate_modules({str(tmp_path / "m")!r})
p, r = ["the Paris", "x y"], ["Paris", "y z"]
out = {{"several": evaluate.load(paths["token_f1"]).compute(predictions=p, references=[["Rome", "Paris"], ["y z"]])}}
out["combined"] = evaluate.combine([paths["exact_match"], paths["token_f1"], paths["rouge"], paths["bleu"], paths["meteor"]]).compute(predictions=p, references=r)
out["labels"] = evaluate.combine([evaluate.load(paths[n]) for n in ("accuracy", "f1", "matthews")]).compute(predictions=["a", "b", "b"], references=["a", "b", "a"])
out["numbers"] = evaluate.load(paths["f1"]).compute(predictions=[1, 0, 1], references=[1, 0, 0], positive=1)
out["confidences"] = evaluate.load(paths["calibration_error"]).compute(predictions=[0.9, 0.9], references=[1, 0], n_bins=5)
one = evaluate.load(paths["bleu"])
for a, b in zip(p, r): one.add(predictions=a, references=b)
out["added"] = one.compute(smooth="add-k")
print(json.dumps(out))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_EVALUATE_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout.splitlines()[-1])
    assert out["several"] == {"token_f1": pytest.approx(0.75)}
    p, r = ["the Paris", "x y"], ["Paris", "y z"]
    combined = out["combined"]
    assert combined["exact_match"] == 0.5 and combined["token_f1"] == pytest.approx(0.75) and combined["bleu"] == pytest.approx(bleu(p, r))
    assert combined["rougeL"] == pytest.approx(np.mean([rouge(a, b)["rougeL"].f1 for a, b in zip(p, r)])) and combined["meteor"] == pytest.approx(np.mean([meteor(a, b) for a, b in zip(p, r)]))
    assert out["labels"]["accuracy"] == pytest.approx(2/3) and out["labels"]["f1"] == pytest.approx(2/3)
    assert out["numbers"]["precision"] == 0.5 and out["confidences"] == {"calibration_error": pytest.approx(0.4)} and out["added"] == {"bleu": pytest.approx(bleu(p, r, smooth="add-k"))}


# --- what metrics can't see -----------------------------------------------------------------------------------
def test_a_fluent_wrong_answer_beats_a_right_one():
    "Three of the chapter's sentences, with sacrebleu as the witness."
    from sacrebleu.metrics import BLEU
    theirs = BLEU(effective_order=True)
    for reference, right, wrong in [("Prices rose by three percent last year.", "Last year everything became 3 % more expensive.", "Prices fell by three percent last year."),
                                    ("No passengers were hurt in the accident.", "Everyone on board was fine.", "Ten passengers were hurt in the accident.")]:
        assert theirs.sentence_score(wrong, [reference]).score > theirs.sentence_score(right, [reference]).score
        assert all(text_scores(wrong, reference)[m] > text_scores(right, reference)[m] for m in ("f1", "bleu", "rouge1", "rougeL", "meteor"))
