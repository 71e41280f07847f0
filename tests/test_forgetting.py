"""Forgetting: gradients against finite steps, losses against the model's own logits, fronts against all pairs, and the study's file."""
import json, math, sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from ftcourse.align.shootout import load_study
from ftcourse.data.batches import encode_rows
from ftcourse.data.sets import data_dir, emoji_codes, load_set
from ftcourse.models import load
from ftcourse.tokens import tiny_tokenizer
from ftcourse.tune import forgetting as M
from ftcourse.tune.forgetting import (CODES, bits_per_byte, continue_pretraining, emoji_scores, forgetting, greek, held_out_loss, interference, mix_replay, new_domain, old_domain, outcomes, pareto,
                                      perplexity, plot_steps, plot_tradeoff, pull_to_start, scaled_adapters, text_trees, watched)
from ftcourse.tune.lora import adapters_off, add_lora, lora_parameters, merge
from ftcourse.tune.sft import make_trainable
from ftcourse.tune.trainer import Run

TOKENIZER = tiny_tokenizer()
ROWS = [dict(prompt=f"{i} and", completion=" one" * (1 + 3 * (i % 3))) for i in range(7)]  # replies of unequal length
TREES = encode_rows(ROWS, TOKENIZER)


def tiny(): return load("tiny")[0]


def tuned(std=0.05):
    model = add_lora(tiny(), r=4, alpha=8)
    gen = torch.Generator().manual_seed(1)
    for p in lora_parameters(model): p.data.normal_(std=std, generator=gen)
    return model


def plain_nats(model, ids, n_given):
    "Sum of the cross-entropy of ids[n_given:], from the model's logits of one unpadded row."
    with torch.no_grad(): logits = model(torch.tensor([ids])).logits[0, n_given - 1:-1]
    return F.cross_entropy(logits, torch.tensor(ids[n_given:]), reduction="sum").item()


# --- the theory ---------------------------------------------------------------------------------------------
def test_interference_by_hand():
    w = torch.zeros(2, requires_grad=True)
    old, new = (3*w[0] + w[1] - 10)**2/2, (w[0] + w[1] - 2)**2/2  # gradients (-30, -10) and (-2, -2)
    dot, cosine = interference(old, new, [w])
    assert dot == 80 and cosine == pytest.approx(80/math.sqrt(1000*8))
    assert interference(old, -new, [w])[0] == -80 and interference(old, -new, [w])[1] == pytest.approx(-80/math.sqrt(8000))
    assert interference(w[0], w[1], [w]) == (0, 0)


def test_interference_over_several_weights_and_unused_ones():
    a, b, c = (torch.ones(n, requires_grad=True) for n in (2, 3, 1))
    old, new = (2*a).sum() + (3*b).sum(), (5*a).sum()
    assert interference(old, new, [a, b, c])[0] == 2*2*5  # b and c have no part in the new loss
    assert math.isnan(interference(old, (c*0).sum(), [a, b, c])[1])


def test_interference_foretells_a_small_step():
    model = tuned().double()
    params = lora_parameters(model)  # float32 in any model
    nats = lambda trees: sum(F.cross_entropy(model(torch.tensor([t.prompt_ids + t.replies[0]])).logits[0, len(t.prompt_ids) - 1:-1], torch.tensor(t.replies[0])) for t in trees)
    old, new = nats(TREES[:2]), nats(TREES[2:4])
    dot, _ = interference(old, new, params)
    grads, lr = torch.autograd.grad(new, params), 1e-3
    with torch.no_grad():
        for p, g in zip(params, grads): p -= lr*g
        assert (nats(TREES[:2]) - old).item() == pytest.approx(-lr*dot, rel=0.05)


def test_pull_to_start_by_hand():
    p, s, f = [torch.tensor([2., 0.]), torch.tensor([[1.]])], [torch.tensor([3., 1.]), torch.tensor([[5.]])], [torch.tensor([9., 1.]), torch.tensor([[.25]])]
    assert pull_to_start(p, s) == (1 + 1 + 16)/2 and pull_to_start(p, s, f) == (9 + 1 + 4)/2 and pull_to_start(s, s, f) == 0
    w = torch.tensor([2., 0.], requires_grad=True)
    grad, = torch.autograd.grad(pull_to_start([w], s[:1], f[:1]), w)
    assert grad.tolist() == [-9, -1]  # F (θ - θ0): a step against it goes back to the start
    for wrong in ((p, s[:1]), (p, s, f[:1]), ([p[0]], [p[0][:1]])):
        with pytest.raises(ValueError, match="same shapes"): pull_to_start(*wrong)


def test_a_pull_keeps_a_model_nearer_to_its_start():
    def distance(strength):
        model = tiny()
        params = list(model.parameters())
        starts = [p.detach().clone() for p in params]
        opt = torch.optim.SGD(params, lr=0.1)
        for _ in range(5):
            loss = model(torch.tensor([[5, 6, 7, 8]]), labels=torch.tensor([[5, 6, 7, 8]])).loss + strength*pull_to_start(params, starts)
            opt.zero_grad(), loss.backward(), opt.step()
        return sum((p - s).square().sum() for p, s in zip(params, starts)).item()
    assert distance(5.) < 0.7*distance(0.)


# --- measures -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_held_out_loss_is_a_mean_over_tokens(batch_size):
    model = tiny()
    nats, counts = zip(*[(plain_nats(model, t.prompt_ids + t.replies[0], len(t.prompt_ids)), len(t.replies[0])) for t in TREES])
    assert held_out_loss(model, TREES, batch_size) == pytest.approx(sum(nats)/sum(counts), rel=1e-5)
    assert perplexity(model, TREES, batch_size) == pytest.approx(math.exp(sum(nats)/sum(counts)), rel=1e-4)
    assert abs(sum(nats)/sum(counts) - sum(n/c for n, c in zip(nats, counts))/len(nats)) > 1e-3  # the mean of means is another number


def test_held_out_loss_leaves_the_model_as_it_was():
    for training in (True, False):
        model = tiny().train(training)
        held_out_loss(model, TREES[:2])
        assert model.training is training and all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="no trees"): held_out_loss(model, [])


def test_forgetting_by_hand():
    assert forgetting({"a": .9, "b": .5}, {"a": .6, "b": .6}) == pytest.approx(.1)
    assert forgetting({"a": .9}, {"a": 1.}) == pytest.approx(-.1)
    assert forgetting({"a": 1.5, "b": 2.}, {"a": 2.5, "b": 2.}, better="low") == .5
    for before, after, better, match in (({"a": 1}, {"b": 1}, "high", "same ones"), ({}, {}, "high", "same ones"), ({"a": 1}, {"a": 1}, "up", "better='up'")):
        with pytest.raises(ValueError, match=match): forgetting(before, after, better)


NUMBERS = st.integers(-3, 3).map(float)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=8))
def test_pareto_by_all_pairs(points):
    def dominated(p):  # by the definition: as good in both, better in one
        return any(q[0] <= p[0] and q[1] >= p[1] and (q[0] < p[0] or q[1] > p[1]) for q in points)
    front = pareto(points)
    assert sorted(front) == [i for i, p in enumerate(points) if not dominated(p)]
    assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)


def test_pareto_refuses_what_it_cannot_order():
    for wrong in ([(0, 1), (math.nan, 1)], [(0, 1), (1, math.inf)], [(0, 1), (1,)]):
        with pytest.raises(ValueError, match="point 1 is"): pareto(wrong)


# --- replay -------------------------------------------------------------------------------------------------
@settings(max_examples=100, deadline=None)
@given(st.integers(0, 60), st.sampled_from([0., .05, .25, .5, .75]), st.integers(0, 5))
def test_replay_keeps_every_new_row_and_the_share(n, share, seed):
    new, old = [f"new {i}" for i in range(n)], [f"old {i}" for i in range(200)]
    mixed = mix_replay(new, old, share, seed)
    counts = Counter(mixed)
    n_old = sum(x.startswith("old") for x in mixed)
    assert all(counts[x] == 1 for x in new) and max(counts.values(), default=1) == 1 and set(mixed) <= {*new, *old}
    assert abs(n_old - share*len(mixed)) <= 1
    assert mixed == mix_replay(new, old, share, seed)


def test_replay_says_how_many(capsys):
    rows = mix_replay([{"text": str(i)} for i in range(900)], [{"text": "old"}]*1000, 0.25)
    assert len(rows) == 1200 and capsys.readouterr().out == "mix_replay: 900 new rows and 300 of 1000 old ones (25% of the mixture)\n"
    assert mix_replay([], [1], 0.5) == []
    order = mix_replay(list(range(100)), [], 0.)
    assert order != list(range(100)) and order != mix_replay(list(range(100)), [], 0., seed=1)


@pytest.mark.parametrize("share,match", [(1., "below 1"), (-.1, "at least 0"), (math.nan, "share=nan"), (.5, "needs 6 old ones, but there are 5")])
def test_replay_refuses(share, match):
    with pytest.raises(ValueError, match=match): mix_replay(range(6), list(range(5)), share)


# --- domains ------------------------------------------------------------------------------------------------
def test_domains_are_apart():
    train, test = new_domain()
    assert set(CODES) <= set(emoji_codes()) and {r["messages"][-1]["content"] for r in train} == set(CODES)
    assert len(train) == sum(r["messages"][-1]["content"] in CODES for r in load_set("emojibot")) >= 160 and len(test) >= 60
    assert not {r["messages"][1]["content"] for r in train} & {r["message"] for r in test}
    replay, held = old_domain()
    assert len(replay) > 200 < len(held)*8 and not {r["messages"][0]["content"] for r in replay} & {r["messages"][0]["content"] for r in held}
    assert max(sum(len(m["content"]) for m in r["messages"]) for r in replay + held) <= 200 and old_domain() == (replay, held)


def test_codes_are_those_that_most_test_messages_accept():
    counts = Counter(c for r in load_set("emojibot", "test") for c in r["acceptable"])
    assert min(counts[c] for c in CODES) >= max(n for c, n in counts.items() if c not in CODES)


def test_emoji_scores_asks_under_the_system_message(monkeypatch):
    asked = []
    def answers(model, tokenizer, prompts, max_new_tokens): asked.extend(prompts); return ["(sad)", "(sad) (laugh)", "hello"]
    monkeypatch.setattr(M, "generate", answers)
    rows = [dict(message=m, acceptable=["(sad)"]) for m in "abc"]
    assert emoji_scores(None, None, rows) == {"format": 2/3, "acceptable": 1/3}
    assert [[m["role"] for m in p] for p in asked] == [["system", "user"]]*3 and asked[1][1]["content"] == "b"


def test_greek_card_is_true():
    card = (data_dir()/"greek"/"CARD.md").read_text(encoding="utf-8")
    for word in ("**Load:**", "**Origin:**", "**Licence:**", "**Known faults:**"): assert word in card
    for split in ("train", "test"):
        rows = greek(split)
        assert f"`{split}.jsonl` | {len(rows)} |" in card and all(set(r) == {"greek", "english"} for r in rows)
        assert all(r["english"].isascii() and all("\u0370" <= c <= "\u03ff" or c in " ,.;" for c in r["greek"]) for r in rows)
    words = [len(r["greek"].split()) for s in ("train", "test") for r in greek(s)]
    assert (min(words), max(words), round(sum(words)/len(words))) == (6, 11, 8) and "6 to 11 words a sentence, 8 on average" in card
    sizes = [sum(len(r[k].encode()) for s in ("train", "test") for r in greek(s)) for k in ("greek", "english")]
    assert round(sizes[0]/sizes[1], 1) == 1.9 and "about 1.9 times" in card
    assert len((data_dir()/"greek"/"LICENSE").read_text(encoding="utf-8")) > 900
    sides = [r[k] for s in ("train", "test") for r in greek(s) for k in r]
    assert len(set(sides)) == len(sides)
    with pytest.raises(ValueError, match="train, test"): greek("validation")


# --- raw text -----------------------------------------------------------------------------------------------
@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40), st.integers(2, 12))
def test_every_token_of_a_text_counts_once(text, max_len):
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    if 2 in ids: return  # it holds the end token
    trees = text_trees([text], TOKENIZER, max_len)
    assert all(len(t) <= max_len and len(t.prompt_ids) == 1 and set(t.masks[0]) == {1} for t in trees)
    assert [i for t in trees for i in t.replies[0]] == [*ids, 2]
    given = [t.prompt_ids[0] for t in trees]
    assert given == [2, *[t.replies[0][-1] for t in trees[:-1]]]  # a piece goes on from the last token of the one before


def test_texts_that_cannot_be_used_are_named():
    for texts, match in (("abc", "one string"), (["a", ""], "text 1 is ''"), (["a", None], "text 1 is None"), (["a", "b<|im_end|>c"], "text 1 holds the end token")):
        with pytest.raises(ValueError, match=match): text_trees(texts, TOKENIZER)
    with pytest.raises(ValueError, match="at least 2"): text_trees(["a"], TOKENIZER, max_len=1)
    assert text_trees([], TOKENIZER) == [] and [t.row for t in text_trees(["abcd", "x"], TOKENIZER, 4)] == [0, 0, 1]


@pytest.mark.parametrize("max_len", [512, 5])
def test_bits_per_byte_from_the_models_own_logits(max_len):
    model, texts = tiny(), ["hello", "αβγ", "one two three"]
    nats = n_bytes = 0
    for text in texts:
        ids = [2, *(b + 3 for b in text.encode()), 2]
        n_bytes += len(text.encode())
        nats += sum(plain_nats(model, ids[i:i + max_len], 1) for i in range(0, len(ids) - 1, max_len - 1))
    assert n_bytes == 5 + 6 + 13
    assert bits_per_byte(model, TOKENIZER, texts, max_len) == pytest.approx(nats/math.log(2)/n_bytes, rel=1e-5)


def test_continued_pretraining_learns_a_text_and_saves(tmp_path):
    texts = ["round and round the garden"]*8
    before = bits_per_byte(tiny(), TOKENIZER, texts[:1])
    bot = continue_pretraining("tiny", texts, method="full", lr=3e-3, n_epochs=40, progress=False)
    assert bits_per_byte(bot.model, TOKENIZER, texts[:1]) < 0.2*before
    out = continue_pretraining("tiny", texts[:3], tmp_path/"run", eval_texts=texts[:1], max_steps=2, max_len=9, progress=False)
    config = json.loads((tmp_path/"run"/"config.json").read_text())
    assert config["max_len"] == 9 and config["run"]["n_rows"] == 3*4 and [h for h in out.history if "eval_loss" in h]  # 27 predictions in pieces of 8
    again = load(tmp_path/"run")[0]
    assert_close(again(torch.tensor([[5, 6]])).logits, out.model(torch.tensor([[5, 6]])).logits)
    for wrong, match in ((dict(method="magic"), "method='magic'"), (dict(max_len=1), "max_len=1"), (dict(lr=0), "lr=0")):
        with pytest.raises(ValueError, match=match): continue_pretraining("tiny", texts, progress=False, **wrong)


def test_a_first_step_on_text_has_the_models_own_loss():
    model, text = tiny(), "garden"
    expected = plain_nats(model, [2, *(b + 3 for b in text.encode()), 2], 1)/7
    bot = continue_pretraining((model, TOKENIZER), [text], max_steps=1, progress=False)
    assert bot.history[0]["loss"] == pytest.approx(expected, rel=1e-4)


# --- adapters, and watching -----------------------------------------------------------------------------------
@torch.no_grad()
def test_a_scaled_adapter_is_part_of_the_update():
    ids = torch.tensor([[5, 6, 7, 8]])
    model, base = tuned(), tiny()
    whole = model(ids).logits
    by_hand = tiny()  # base weights plus 0.3 of each update
    for name, layer in [(n, m) for n, m in model.named_modules() if hasattr(m, "delta")]: by_hand.get_submodule(name).weight += 0.3*layer.delta()
    with scaled_adapters(model, 0.3): assert_close(model(ids).logits, by_hand(ids).logits, atol=1e-5, rtol=1e-5)
    with scaled_adapters(model, 0.): assert torch.equal(model(ids).logits, base(ids).logits)
    with pytest.raises(RuntimeError):
        with scaled_adapters(model, 0.5): raise RuntimeError
    assert torch.equal(model(ids).logits, whole)
    with adapters_off(model): assert torch.equal(model(ids).logits, base(ids).logits)
    with pytest.raises(ValueError, match="no LoRA layers"), scaled_adapters(base, 1.): pass
    with pytest.raises(ValueError, match="is merged"), scaled_adapters(merge(model), 1.): pass


def test_watching_measures_at_the_steps_and_changes_nothing():
    modes, results = [], []
    torch.manual_seed(0)
    def measure(model): modes.append(model.training); return dict(loss=held_out_loss(model, TREES), noise=torch.rand(1).item())
    for at in ([], [0, 1, 3]):
        model = tiny()
        make_trainable(model, "lora", dropout=0.1)  # measuring draws too, and dropout mustn't notice
        seen = watched(model, TREES, measure if at else None, at, Run(lr=1e-2, batch_size=3, n_epochs=1, progress=False))
        assert [s["step"] for s in seen] == at
        results.append(model)
    assert modes == [False]*3 and seen[0]["loss"] == pytest.approx(held_out_loss(tiny(), TREES)) and seen[-1]["loss"] == held_out_loss(results[1], TREES)
    assert seen[-1]["loss"] < seen[0]["loss"]
    for p, q in zip(*map(lora_parameters, results)): assert torch.equal(p, q)
    with pytest.raises(ValueError, match=r"3 steps, so it can't be measured after \[4\]"): watched(tiny(), TREES, measure, [0, 4], Run(batch_size=3, n_epochs=1))


# --- the study ----------------------------------------------------------------------------------------------
RUNS = [dict(arm=arm, seed=s, curve=[dict(step=0, old_loss=1., acceptable=0.), dict(step=4, old_loss=1. + lost + s/10, acceptable=got)])
        for arm, lost, got in (("a", .5, .9), ("b", .1, .6), ("c", .6, .8)) for s in (0, 1)]


def test_outcomes_are_rises_and_ends():
    found = outcomes(RUNS)
    assert list(found) == ["a", "b", "c"] and found["a"] == [(pytest.approx(.5), .9), (pytest.approx(.6), .9)]
    assert outcomes(RUNS, at=0)["c"] == [(0., 0.)]*2
    assert outcomes(RUNS, lost="acceptable", gained="old_loss")["b"][0] == (.6, pytest.approx(1.1))


def test_pictures_show_the_runs():
    titles = {"a": "A", "b": "B", "c": "C"}
    ax = plot_steps(RUNS, "old_loss", titles, "loss (nats)")
    assert len(ax.lines) == 9 and [line.get_label() for line in ax.lines if line.get_lw() == 2] == ["A", "B", "C"]
    assert list(ax.lines[2].get_ydata()) == pytest.approx([1., 1.55]) and ax.get_ylabel() == "loss (nats)"
    ax = plot_tradeoff(outcomes(RUNS), titles)
    front = ax.lines[-1]
    assert list(front.get_xdata()) == pytest.approx([.15, .55]) and list(front.get_ydata()) == [.6, .9]  # c is dominated


def test_the_committed_study_is_complete():
    study = load_study(str(data_dir()/"results"/"forgetting.json"))
    assert len(study["seeds"]) >= 3 and all(study[k] for k in ("command", "commit", "machine", "versions", "seconds", "model"))
    assert {"full", "full_replay", "lora_8", "lora_8_replay", "lora_64"} == set(study["arms"])
    keys = {"step", "old_loss", "perplexity", "english", "format", "acceptable", "first", "second"}
    for arm in [*study["arms"], "sequential"]:
        runs = [r for r in study["runs"] + study["sequential"] if r["arm"] == arm]
        assert sorted(r["seed"] for r in runs) == study["seeds"] and len({tuple(p["step"] for p in r["curve"]) for r in runs}) == 1
        for r in runs:
            assert r["curve"][0]["step"] == 0 and len(r["curve"]) >= 3 and all(set(p) == keys and all(map(math.isfinite, p.values())) for p in r["curve"])
            assert all(p["perplexity"] == pytest.approx(math.exp(p["old_loss"])) and p["acceptable"] == pytest.approx((p["first"] + p["second"])/2) for p in r["curve"])
    steps = lambda arm: next(r["curve"][-1]["step"] for r in study["runs"] if r["arm"] == arm)
    assert steps("lora_8") < steps("lora_8_replay") and steps("lora_8") == next(r["curve"][-1]["step"] for r in study["sequential"])


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent/"studies"))
    monkeypatch.delitem(sys.modules, "forgetting", raising=False)
    import forgetting
    yield forgetting
    sys.modules.pop("forgetting")


def test_the_study_is_fair(script):
    table = script.arms(1e-4, 2e-3)
    assert table["lora_8"]["alpha"]/8**.5 == pytest.approx(table["lora_64"]["alpha"]/64**.5, rel=0.01)
    first, second = script.halves(script.SIZES["smollm2-135m"])
    assert len(first) == len(second) == script.SIZES["smollm2-135m"]["n_test"]//2
    assert not [r for r in first if set(r["acceptable"]) & set(CODES[1::2])] and not [r for r in second if set(r["acceptable"]) & set(CODES[::2])]
    rows = script.rows_of(CODES, 144, 1)
    assert rows == script.rows_of(CODES, 144, 1) != script.rows_of(CODES, 144, 2) and len({r["messages"][1]["content"] for r in rows}) == 144


def test_one_run_of_the_study(script, tmp_path):
    job = dict(arm="lora_8_replay", seed=0, model="tiny", method="lora", r=2, alpha=4, lr=1e-2, share=0.25)
    record = script.run(job, tmp_path)
    assert [p["step"] for p in record["curve"]] == [0, 1, 2, 3] and record["curve"][-1]["old_loss"] < record["curve"][0]["old_loss"]
    record = script.run({k: v for k, v in job.items() if k != "share"} | dict(arm="sequential"), tmp_path)
    assert [p["step"] for p in record["curve"]] == [0, 1, 2]
