"""Scores of texts: against each model's own logits on one plain row, against lm-eval item by item, and what is shared and cut on the way."""
import itertools, logging, random

import pytest
import torch
from test_trees import V, YES, build

import ftcourse.evals.scoring as S
from ftcourse.evals.scoring import Likelihood, context_size, encode_pair, id_likelihoods, loglikelihoods, rolling_loglikelihood, rolling_windows
from ftcourse.models import load
from ftcourse.tune import trees
from ftcourse.tune.lora import add_lora, lora_parameters

WORDS = "the cat sat on a mat and looked at green birds while seven dogs ran far away".split()


def text(rng, n): return " ".join(rng.choice(WORDS) for _ in range(n))


def alone(model, context_ids, ids):
    "(logp, greedy) by the model's own logits of one unpadded row."
    with torch.no_grad(): z = model(input_ids=torch.tensor([[*context_ids, *ids]]), use_cache=False).logits[0, len(context_ids)-1:-1].float().log_softmax(-1)
    y = torch.tensor(list(ids))
    return z.gather(-1, y[:, None]).sum().item(), bool((z.argmax(-1) == y).all())


def mixture(seed=0, top=V):
    "Pairs of ids of every kind: shared beginnings, shared questions, answers that begin alike, repeated ones, one-token contexts, single lines."
    rng = random.Random(seed)
    ids = lambda n: tuple(rng.randrange(3, top) for _ in range(n))
    front, questions, line = ids(20), [ids(6) for _ in range(4)], ids(40)
    pairs = [(front + q, y) for q in questions for y in (ids(1), ids(1), (5,) + ids(3), (5,) + ids(2), (5,))]
    pairs += [(line[:1], line[1:n]) for n in (15, 30, 40)] + [(line[:30], ids(2))] + [((7,), ids(3)) for _ in range(2)] + [pairs[0]]
    rng.shuffle(pairs)
    return pairs


def worst(got, want):
    assert [g for _, g in got] == [g for _, g in want]
    return max(abs(a - b) for (a, _), (b, _) in zip(got, want, strict=True))


def with_limits(monkeypatch, trie_up_to, cache_from): monkeypatch.setattr(S._Scorer.__init__, "__defaults__", (None, trie_up_to, cache_from))


@pytest.fixture(scope="module")
def tiny(): return load("tiny")


# --- the engine -------------------------------------------------------------------------------------------------
def test_trie_holds_every_beginning_once_and_sees_only_its_own():
    rng = random.Random(1)
    items = sorted((S._Item(tuple(rng.randrange(3) for _ in range(rng.randrange(2, 7))), 1) for _ in range(30)), key=lambda item: item.inputs)
    shared = [0] + [len(S.commonprefix([a.inputs, b.inputs])) for a, b in zip(items, items[1:])]
    trie = S._trie(items, shared, 0, len(items))
    beginnings = {item.inputs[:i] for item in items for i in range(1, len(item.inputs) + 1)}
    assert len(trie.ids) == len(beginnings)
    paths = [tuple(trie.ids[j] for j in range(i + 1) if i <= trie.ends[j]) for i in range(len(trie.ids))]     # what token i looks at, in order
    assert set(paths) == beginnings and [len(p) - 1 for p in paths] == trie.depths
    for k, item in enumerate(items): assert [paths[i] for i in trie.sources[k]] == [item.inputs[:n] for n in range(1, len(item.ids))]


@pytest.mark.parametrize("limits", [(512, 32), (30, 8), (12, 4), (1, 1), (512, 1)])
def test_every_way_of_sharing_gives_the_models_own_numbers(tiny, monkeypatch, limits):
    # item 96: whatever is shared and batched with what
    pairs = mixture(top=250)
    want = [alone(tiny[0], *p) for p in pairs]
    with torch.no_grad(): assert not S._why_not(tiny[0], 60)
    with_limits(monkeypatch, *limits)
    for n in (1, 40, 1024): assert worst(id_likelihoods(tiny[0], pairs, tokens_per_batch=n), want) < 1e-4


@pytest.mark.parametrize("kind", [k for k in YES if k != "falcon"]) # whose attention has no interface
def test_model_families(kind, monkeypatch):
    model, pairs = build(kind), mixture()
    with torch.no_grad(): assert not S._why_not(model, 60)
    want = [alone(model, *p) for p in pairs]
    with_limits(monkeypatch, 12, 4)
    assert worst(id_likelihoods(model, pairs), want) < 2e-4


@pytest.mark.parametrize("kind, more", [("mistral", dict(sliding_window=8)), ("gemma2", {}), ("bloom", {}), ("falcon", {})])
def test_models_that_cannot_share_get_rows(kind, more, caplog):
    model, pairs = build(kind, **more), mixture()
    with caplog.at_level(logging.WARNING, "ftcourse"): got = id_likelihoods(model, pairs, tokens_per_batch=100)
    assert caplog.records and worst(got, [alone(model, *p) for p in pairs]) < 2e-4


def test_a_wrong_mask_is_noticed_and_not_used(monkeypatch, caplog):
    "The probe compares numbers: a forest in which everybody sees everything is refused, and rows give the right ones."
    model, _ = load("tiny")
    monkeypatch.setattr(S._Forest, "mask", lambda self, H, h, dtype: torch.zeros(self.N*h, H//h*self.T, self.start + self.T, dtype=dtype))
    pairs = mixture(top=250)
    with caplog.at_level(logging.WARNING, "ftcourse"): assert worst(id_likelihoods(model, pairs), [alone(model, *p) for p in pairs]) < 1e-4
    assert "gave other numbers than plain rows" in caplog.text


def test_a_model_without_the_attention_interface_gets_rows(monkeypatch):
    model, _ = load("tiny")
    monkeypatch.setattr(S._Forest, "attend", lambda *args: (_ for _ in ()).throw(NotImplementedError("no")))
    with torch.no_grad(): assert S._why_not(model, 60) == "couldn't (NotImplementedError: no)"
    assert model.config._attn_implementation == "sdpa" and trees._plan is None
    pairs = mixture(top=250)[:6]
    assert worst(id_likelihoods(model, pairs), [alone(model, *p) for p in pairs]) < 1e-4


def test_an_adapter_counts_and_the_model_comes_back_as_it_was():
    model, _ = load("tiny")
    pairs = mixture(top=250)
    before = id_likelihoods(model, pairs)
    add_lora(model, 4, 8)
    g = torch.Generator().manual_seed(0)
    for p in lora_parameters(model): p.data += 0.1*torch.randn(p.shape, generator=g)
    model.train()
    got = id_likelihoods(model, pairs)
    assert model.training and model.config._attn_implementation == "sdpa" and all(p.grad is None for p in model.parameters())
    model.eval()
    assert worst(got, [alone(model, *p) for p in pairs]) < 1e-4 and max(abs(a - b) for (a, _), (b, _) in zip(got, before)) > 0.01


def test_shared_text_is_computed_once(tiny, monkeypatch):
    rng = random.Random(0)
    ids = lambda n: tuple(rng.randrange(3, 250) for _ in range(n))
    shots, questions, answers = ids(600), [ids(30) for _ in range(20)], [ids(4) for _ in range(5)]
    count, forward = [], S._Scorer.forward
    monkeypatch.setattr(S._Scorer, "forward", lambda self, x, **more: count.append(x.numel()) or forward(self, x, **more))
    id_likelihoods(tiny[0], [((5,), (6,))])
    count.clear()
    id_likelihoods(tiny[0], [(shots + q, y) for q in questions for y in answers])
    # 600 of shots, and for each question its 30 and its answers' tokens but the last; the last tokens of the shots may come again in branches
    assert 600 + 20*(30 + 5*3) - 20*8 <= sum(count) <= 600 + 20*(30 + 5*3) + 64


def test_grows_a_cache_without_touching_the_one_given(tiny):
    cache = S._copied(None)
    scorer = S._Scorer(tiny[0], [], 100)
    with torch.no_grad():
        scorer.own((5, 6, 7), 0, cache)
        kept = cache.layers[0].keys.clone()
        scorer.own((8, 9), 3, S._copied(cache))
    assert cache.get_seq_length() == 3 and torch.equal(cache.layers[0].keys, kept)


def test_head_by_hand_and_by_torch():
    g = torch.Generator().manual_seed(0)
    h, head = torch.randn(7, 8, generator=g), torch.nn.Linear(8, 11)
    with torch.no_grad():
        y = head(h).topk(2).indices[range(7), [0, 1, 0, 1, 1, 0, 0]]     # first and second choices
        for scale, cap in ((1., None), (0.25, None), (1., 3.)):
            z = head(h)*scale
            z = cap*torch.tanh(z/cap) if cap else z
            logps, greedy = S._head_scores(h, head, y, scale, cap, chunk=3)
            torch.testing.assert_close(logps, z.log_softmax(-1)[range(7), y])
            assert greedy.tolist() == [True, False, True, False, False, True, True]
        flat = torch.nn.Linear(8, 500, bias=False, dtype=torch.bfloat16)
        flat.weight.fill_(1)
        assert S._head_scores(h.bfloat16(), flat, torch.tensor([0, 1, 499, 0, 250, 0, 2]))[1].tolist() == [True, False, False, True, False, True, False] # of equals the first


def test_log_probabilities_of_a_bfloat16_model_are_taken_in_float32():
    "A thousand equal logits: each has probability 1/1000, which a 16-bit logarithm misses in the second digit."
    head = torch.nn.Linear(4, 1000, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        head.weight.fill_(0.5)
        logps, _ = S._head_scores(torch.ones(2, 4, dtype=torch.bfloat16), head, torch.tensor([0, 999]))
    torch.testing.assert_close(logps, torch.full((2,), -6.9077553))


# --- texts ------------------------------------------------------------------------------------------------------
def test_spaces_at_the_contexts_end_belong_to_the_continuation(tiny):
    # item 91
    tokenizer = tiny[1]
    spaced, plain = loglikelihoods(*tiny, [("seven is  ", "7"), ("seven is", "  7")])
    assert spaced.n_tokens == plain.n_tokens == 3 and spaced.logp == pytest.approx(plain.logp, abs=1e-5)
    assert encode_pair(tokenizer, "is  ", "7") == encode_pair(tokenizer, "is", "  7") == (tokenizer("is")["input_ids"], tokenizer("  7")["input_ids"])
    assert encode_pair(tokenizer, "is\n", "7") == encode_pair(tokenizer, "is", "\n7")
    bos = tokenizer.bos_token_id
    assert encode_pair(tokenizer, "", "ab") == ([bos], tokenizer("ab")["input_ids"])
    assert encode_pair(tokenizer, "", tokenizer.bos_token + "ab") == ([bos], tokenizer("ab")["input_ids"])   # it's there already
    assert encode_pair(tokenizer, "  ", "ab") == ([bos], tokenizer("  ab")["input_ids"])


def test_the_first_token_is_predicted_and_the_last_one_counts(tiny):
    "Over all continuations of one letter, and of two, probabilities sum to that of what comes before."
    model, tokenizer = tiny
    every = list(range(len(tokenizer)))
    got = id_likelihoods(model, [((5, 6), (i,)) for i in every])
    assert torch.tensor([lp for lp, _ in got]).double().exp().sum().item() == pytest.approx(1, abs=1e-5) and sum(g for _, g in got) == 1
    two = id_likelihoods(model, [((5, 6), (9, i)) for i in every])
    assert torch.tensor([lp for lp, _ in two]).double().exp().sum().log().item() == pytest.approx(got[9][0], abs=1e-4)


def test_results_in_order_whatever_the_order(tiny):
    # item 96
    model, tokenizer = tiny
    rng = random.Random(3)
    pairs = [(text(rng, 3 + i % 4), " " + text(rng, 1 + i % 3)) for i in range(15)]
    one = [loglikelihoods(model, tokenizer, [p])[0] for p in pairs]
    for order in (list(range(15))[::-1], rng.sample(range(15), 15)):
        got = loglikelihoods(model, tokenizer, [pairs[i] for i in order], tokens_per_batch=70)
        for i, g in zip(order, got):
            assert abs(g.logp - one[i].logp) < 1e-4 and (g.greedy, g.n_tokens, g.truncated) == (one[i].greedy, len(pairs[i][1]), 0)


def test_contexts_are_cut_on_the_left_and_counted(tiny):
    model, tokenizer = tiny
    long, fits, tight = loglikelihoods(model, tokenizer, [("abcdefgh", "xyz"), ("gh", "xyz"), ("bcdefgh", "xyz")], max_len=9)
    assert (long.truncated, fits.truncated, tight.truncated) == (1, 0, 0)                 # 8 + 3 - 1 that is only predicted: one too many
    assert long.logp == pytest.approx(tight.logp, abs=1e-5)
    (most,) = loglikelihoods(model, tokenizer, [("abcdefgh", "xyz")], max_len=3)
    assert most.truncated == 7 and most.logp == pytest.approx(loglikelihoods(model, tokenizer, [("h", "xyz")])[0].logp, abs=1e-5)


@pytest.mark.parametrize("pairs, max_len, words", [([("a", "b"), ("a", "")], None, "pair 1: .*nothing is left to score"), ([("", "")], None, "pair 0: .*nothing is left"),
                                                   ([("a", "b"), ("a", "long one")], 4, "pair 1: .*8 tokens.* 4 at once")])
def test_what_cannot_be_scored_is_named(tiny, pairs, max_len, words):
    with pytest.raises(ValueError, match=words): loglikelihoods(*tiny, pairs, max_len=max_len)


def test_encoder_decoder_is_refused():
    import transformers as tf
    model = tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=V, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4, decoder_start_token_id=0))
    with pytest.raises(ValueError, match="causal language models"): id_likelihoods(model, [((5,), (6,))])


def test_nothing_in_nothing_out(tiny):
    assert loglikelihoods(*tiny, []) == [] and rolling_loglikelihood(*tiny, []) == []
    assert rolling_loglikelihood(*tiny, [""]) == [Likelihood(0, True, 0, 0)]


def test_context_size(tiny):
    assert context_size(tiny[0]) == 8192 and context_size(build("gpt2")) == 128 and context_size(build("bloom")) == 2048
    assert context_size(build("bloom"), type("T", (), dict(model_max_length=77))) == 77


# --- rolling windows --------------------------------------------------------------------------------------------
def test_windows_by_hand():
    assert rolling_windows([1, 2, 3, 4, 5, 6, 7, 8, 9], 0, 4) == [([0], [1, 2, 3, 4]), ([4], [5, 6, 7, 8]), ([5, 6, 7, 8], [9])]
    assert rolling_windows([], 0, 4) == [] and rolling_windows([1], 0, 4) == [([0], [1])]
    for context in (0, 5):
        with pytest.raises(ValueError, match=f"context_len={context}"): rolling_windows([1], 0, 4, context)


def test_windows_are_lm_evals():
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    for n, size, context in itertools.product(range(1, 14), range(1, 7), range(1, 7)):
        if context > size: continue
        theirs = [make_disjoint_window(w) for w in get_rolling_token_windows(list(range(1, n + 1)), 0, size, context)]
        assert rolling_windows(list(range(1, n + 1)), 0, size, context) == theirs


def test_rolling_is_the_sum_of_plain_windows(tiny):
    model, tokenizer = tiny
    rng = random.Random(5)
    texts = [text(rng, n) for n in (3, 40, 17)]
    for context in (1, 10):
        got = rolling_loglikelihood(model, tokenizer, texts, 32, context)
        for t, g in zip(texts, got):
            want = [alone(model, *w) for w in rolling_windows(tokenizer(t)["input_ids"], tokenizer.bos_token_id, 32, context)]
            assert g.logp == pytest.approx(sum(lp for lp, _ in want), abs=1e-3) and g.n_tokens == len(t)


# --- lm-eval, item by item --------------------------------------------------------------------------------------
def requests(pairs): return [type("Request", (), dict(args=p)) for p in pairs]


def awkward(rng):
    "Pairs as tasks make them, and some as they shouldn't."
    shots = text(rng, 60) + "\n\n"
    pairs = [(shots + "Question: " + text(rng, 8) + "\nAnswer:" + " "*(i % 3), " " + text(rng, n)) for i in range(6) for n in (1, 2, 4)]
    return pairs + [("", text(rng, 3)), ("გამარჯობა ", "მსოფლიო"), ("Ποιος;", " Εγώ"), ("emoji 🦜 ", "🦜🦜"), (text(rng, 300), " far"), ("tab\t", "x"), (shots, "A"), (shots, "B"), ("a", "\n")]


def test_lm_evals_numbers(tiny):
    # items 91, 96
    from lm_eval.models.huggingface import HFLM
    model, tokenizer = tiny
    pairs = awkward(random.Random(7))
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=600)
    for context, continuation in pairs:
        if context: assert encode_pair(tokenizer, context, continuation) == tuple(theirs._encode_pair(context, continuation))
    got = loglikelihoods(model, tokenizer, pairs, max_len=600)
    for g, (logp, greedy) in zip(got, theirs.loglikelihood(requests(pairs), disable_tqdm=True), strict=True): assert abs(g.logp - logp) < 1e-3 and g.greedy == greedy
    assert sum(g.truncated > 0 for g in got) == 1
    texts = [text(random.Random(8), n) for n in (2, 200)]
    rolled = theirs.loglikelihood_rolling(requests([(t,) for t in texts]), disable_tqdm=True)
    assert [f.logp for f in rolling_loglikelihood(model, tokenizer, texts, 600)] == pytest.approx(rolled, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lm_evals_numbers_on_smollm2(dtype):
    "In float32 to a thousandth; in bfloat16 no farther from float32 on average, and other choices only where the two best are closer than that."
    from lm_eval.models.huggingface import HFLM
    pairs = awkward(random.Random(9))
    exact, tokenizer = load("smollm2-135m", dtype=torch.float32)
    truth = torch.tensor([logp for logp, _ in HFLM(pretrained=exact, tokenizer=tokenizer, batch_size=4).loglikelihood(requests(pairs), disable_tqdm=True)])
    model = load("smollm2-135m", dtype=dtype)[0]
    ours = torch.tensor([f.logp for f in loglikelihoods(model, tokenizer, pairs)])
    if dtype == torch.float32: torch.testing.assert_close(ours, truth, atol=1e-3, rtol=0)
    else:
        theirs = torch.tensor([logp for logp, _ in HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4).loglikelihood(requests(pairs), disable_tqdm=True)])
        assert (ours - truth).abs().mean() <= (theirs - truth).abs().mean()
        for a, b, t in zip(*(x[:18].split(3) for x in (ours, theirs, truth))):
            top = t.sort(descending=True).values
            assert a.argmax() == b.argmax() or top[0] - top[1] < (a - t).abs().max() + (b - t).abs().max()
