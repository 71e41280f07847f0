"""Reward models: losses by hand, scores against plain forward passes and Transformers' own class, training, calibration, the length bias."""
import math

import pytest
import torch
from torch.testing import assert_close

import ftcourse.align.reward as W
from ftcourse.align.reward import (RewardHead, RewardModel, add_reward_head, balance_lengths, bradley_terry_loss, calibration, closed, length_bias, load_reward,
                                   pair_accuracy, ranking_loss, reply_scores, reward_objective, reward_trees, train_reward)
from ftcourse.data.batches import Tree, encode_rows, pack
from ftcourse.models import load, sample_ids
from ftcourse.tokens import apply_template, end_of_turn_id
from ftcourse.tune.lora import add_lora, lora_parameters, lora_state
from ftcourse.tune.trees import batch_trees

PAIRS = [{"prompt": f"number {i} is", "chosen": f" good {i}", "rejected": " bad" + " and worse"*(i % 3)} for i in range(12)]
RANKED = [{"prompt": f"number {i} is", "completions": [" best", f" fair {i}", " worst of all", " also fair"], "scores": [3, 2, 0.5, 2]} for i in range(6)]
QUIET = dict(progress=False, dtype=torch.float32)
TREES = [Tree((5, 6, 7), ((8, 9, 2), (2,), (10, 11, 12, 2)), ((1,)*3, (1,), (1,)*4)), Tree((5, 9), ((8, 9, 2), (40, 2)), ((1,)*3, (1,)*2)), Tree((50, 51, 52, 53), ((8, 2),), ((1, 1),))]


def scored(seed=0):
    "A tiny model with an adapter that isn't zero and a head."
    model, tokenizer = load("tiny")
    add_lora(model, 4, 8)
    gen = torch.Generator().manual_seed(seed)
    for p in lora_parameters(model): p.data += 0.05*torch.randn(p.shape, generator=gen)
    return add_reward_head(model), tokenizer


@torch.no_grad()
def plain(model, tree):
    "(K,) the last hidden state of one unpadded row a reply, times the head's weights."
    states = [model(input_ids=torch.tensor([tree.prompt_ids + r]), output_hidden_states=True).hidden_states[-1][0, -1] for r in tree.replies]
    return torch.stack(states).float() @ model.score.weight.detach()


# --- losses ---------------------------------------------------------------------------------------------------
def test_bradley_terry_by_hand():
    # item 2: ln 2 at equal scores; a constant on both changes nothing; σ(1.5) is 81.8 %
    chosen, rejected = torch.tensor([1.9, 0., -3.]), torch.tensor([0.4, 0., 3.])
    want = torch.tensor([0.2014133, math.log(2), 6.0024757])
    assert_close(bradley_terry_loss(chosen, rejected, reduction="none"), want)
    assert_close(bradley_terry_loss(chosen, rejected), want.mean())
    assert_close(bradley_terry_loss(chosen + 7.5, rejected + 7.5), want.mean())
    assert_close(bradley_terry_loss(chosen, rejected, margin=torch.tensor([1.5, 0., -6.]), reduction="none"), torch.tensor([math.log(2)]*3))
    assert bradley_terry_loss(torch.tensor([-200.]), torch.tensor([200.])).item() == 400 # finite where exp isn't


def test_the_gradient_raises_the_chosen_by_how_wrong_it_is():
    # item 2: d loss / d chosen = -σ(rejected - chosen)
    chosen, rejected = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (0.3, 1.3))
    bradley_terry_loss(chosen, rejected).backward()
    assert chosen.grad.item() == pytest.approx(-math.e/(1 + math.e)) and rejected.grad.item() == pytest.approx(math.e/(1 + math.e))


def test_ranking_by_hand():
    pair = lambda d: math.log1p(math.exp(-d))
    scores = torch.tensor([[2., 1., 0.], [3., 5., math.nan], [0., 4., 1.], [1., 1., 1.]], requires_grad=True)
    ranks = torch.tensor([[1, 2, 2], [2, 1, 0], [3, 1, 2], [1, 1, 0]])
    want = [(pair(1) + pair(2))/2, pair(2), (pair(3) + pair(4) + pair(1))/3, 0.]
    assert_close(ranking_loss(scores, ranks, reduction="none"), torch.tensor(want))
    loss = ranking_loss(scores, ranks)
    assert loss.item() == pytest.approx(sum(want)/3) # each row with a pair counts once
    loss.backward()
    assert scores.grad[1, 2] == 0 and scores.grad[3].eq(0).all() and scores.grad.isfinite().all()


def test_two_replies_are_a_pair():
    scores = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    assert_close(ranking_loss(scores, torch.tensor([[1, 2]]*20)), bradley_terry_loss(scores[:, 0], scores[:, 1]))
    order = torch.tensor([[1, 2, 3, 4]]*20)
    wide = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
    turn = torch.tensor([2, 0, 3, 1])
    assert_close(ranking_loss(wide, order), ranking_loss(wide[:, turn], order[:, turn]))


@pytest.mark.parametrize("call, words", [
    (lambda: bradley_terry_loss(torch.zeros(3), torch.zeros(3, 1)), r"\(3,\), \(3, 1\)"), (lambda: bradley_terry_loss(torch.zeros(3), torch.zeros(3), torch.zeros(3, 1)), r"\(3, 1\)"),
    (lambda: bradley_terry_loss(torch.zeros(3), torch.zeros(3), reduction="sum"), "'sum'"), (lambda: ranking_loss(torch.zeros(3), torch.ones(3)), r"\(B, K\)"),
    (lambda: ranking_loss(torch.zeros(1, 2), torch.tensor([[1., math.nan]])), "0 \\(no reply\\)"), (lambda: ranking_loss(torch.zeros(1, 2), torch.tensor([[1, -1]])), "lowest rank -1"),
    (lambda: ranking_loss(torch.zeros(1, 2), torch.tensor([[1, 1]])), "no row has two replies"), (lambda: pair_accuracy(torch.zeros(0), torch.zeros(0)), "no pairs"),
    (lambda: calibration(torch.zeros(0), torch.zeros(0)), "0 pairs"), (lambda: length_bias(torch.zeros(2), torch.ones(2)), "must differ"),
    (lambda: length_bias(torch.tensor([1., 2.]), torch.tensor([1., 2.]), torch.tensor([0, 1])), "must differ"), (lambda: balance_lengths(RANKED), "these rows hold ranking"),
])
def test_wrong_input_says_what(call, words):
    with pytest.raises(ValueError, match=words): call()


def test_a_tie_is_not_right():
    # item 9
    assert pair_accuracy(torch.tensor([1., 1., 0., 5.]), torch.tensor([0., 1., 2., 4.])) == 0.5
    assert pair_accuracy(torch.zeros(4), torch.zeros(4)) == 0


# --- the head and where it reads ---------------------------------------------------------------------------------
def test_the_head_starts_small():
    # item 5: standard deviation 1/sqrt(d + 1), bias 0
    w = RewardHead(40_000, torch.Generator().manual_seed(3)).weight.detach()
    assert w.std().item() == pytest.approx(1/math.sqrt(40_001), rel=0.02) and abs(w.mean().item()) < 4/40_000
    head = RewardHead(8)
    assert head(torch.zeros(8)) == 0 and [n for n, _ in head.named_parameters()] == ["weight"]
    a, b, c = (add_reward_head(load("tiny")[0], seed).score.weight for seed in (0, 0, 1))
    assert a.equal(b) and not a.equal(c)
    with pytest.raises(ValueError, match="has a `score`"): add_reward_head(add_reward_head(load("tiny")[0]))


def test_scores_are_read_at_the_last_token_of_prompt_and_reply():
    # item 1, item 3
    model, _ = scored()
    want = torch.cat([plain(model, t) for t in TREES])
    with torch.no_grad(): assert_close(reply_scores(model, batch_trees([closed(t) for t in TREES], model)), want, atol=1e-5, rtol=0)
    same_reply = (want[0] - want[3]).abs()
    assert TREES[0].replies[0] == TREES[1].replies[0] and same_reply > 1e-3 # the prompt is read
    assert (want[0] - want[2]).abs() > 1e-3 # and so is the reply


@pytest.mark.parametrize("pad_id", [0, 2, 77])
def test_padding_and_mates_do_not_matter(pad_id):
    # item 3, item 4: any filling, the end token too; rows of their own, shared, joined, in any order and company
    model, _ = scored()
    want = [plain(model, t) for t in TREES]
    shut = [closed(t) for t in TREES]
    with torch.no_grad():
        for batch in (pack(shut, pad_id), pack(shut, pad_id, max_tokens=60), pack(shut, pad_id, share=False), batch_trees(shut, model, pad_id)):
            assert_close(reply_scores(model, batch), torch.cat(want), atol=1e-5, rtol=0)
        assert_close(reply_scores(model, pack(shut[::-1], pad_id)), torch.cat(want[::-1]), atol=1e-5, rtol=0)
        for t, w in zip(shut, want): assert_close(reply_scores(model, pack([t], pad_id)), w, atol=1e-5, rtol=0)


def test_the_batch_size_does_not_matter():
    # item 4
    reward = RewardModel(*scored())
    prompts, replies = [r["prompt"] for r in PAIRS], [r["rejected"] for r in PAIRS]
    want = torch.cat([plain(reward.model, t) for t in encode_rows([dict(prompt=p, completion=r) for p, r in zip(prompts, replies)], reward.tokenizer)])
    for size in (1, 5, 16): assert_close(reward.scores(prompts, replies, batch_size=size), want, atol=1e-5, rtol=0)
    assert_close(reward(prompts, replies), want, atol=1e-5, rtol=0)


def test_ids_are_scored_as_they_were_drawn():
    reward = RewardModel(*scored())
    drawn = sample_ids(reward.model, reward.tokenizer, ["2 + 2 =", "hello"], max_new_tokens=6)
    assert_close(reward.score_ids(drawn), torch.cat([plain(reward.model, Tree(p, (r,), ((1,)*len(r),))) for p, r in drawn]), atol=1e-5, rtol=0)


def test_batches_that_are_not_closed_are_refused():
    model, _ = scored()
    for trees in (TREES, [Tree((5,), ((2,),), ((1,),))]):
        with pytest.raises(ValueError, match="closed"): reply_scores(model, pack(trees))
    with pytest.raises(ValueError, match="no head"): reply_scores(load("tiny")[0], pack([closed(TREES[0])]))
    with pytest.raises(ValueError, match="row 4 has an empty reply"): closed(Tree((5,), ((),), ((),), 4))


def test_an_empty_reply_is_its_end_token():
    reward, chat = RewardModel(*scored()), [{"role": "user", "content": "Hi"}]
    ids = apply_template(reward.tokenizer, chat, add_generation_prompt=True)
    by_hand = [plain(reward.model, Tree(tuple(ids), ((end_of_turn_id(reward.tokenizer),),), ((1,),))), plain(reward.model, Tree(tuple(reward.tokenizer("b")["input_ids"]), ((reward.tokenizer.eos_token_id,),), ((1,),)))]
    assert_close(reward.scores([chat, "b", chat], ["", "", "\n"]), torch.cat([*by_hand, by_hand[0]]), atol=1e-5, rtol=0)


def test_bad_texts_say_which():
    reward = RewardModel(*scored())
    with pytest.raises(ValueError, match="2 prompts but 1 replies"): reward.scores(["a", "b"], [" c"])
    reward.model.config.max_position_embeddings = 20
    assert len(reward.scores(["a"], ["b"*17])) == 1 # with its end token and the closing one: 20
    with pytest.raises(ValueError, match="more than the 19 tokens"): reward.scores(["a"], ["b"*18])


def test_the_head_computes_in_float32():
    model, _ = load("tiny", dtype=torch.bfloat16)
    add_reward_head(model)
    with torch.no_grad(): assert reply_scores(model, batch_trees([closed(t) for t in TREES], model)).dtype == torch.float32 == model.score.weight.dtype


# --- data ------------------------------------------------------------------------------------------------------
def test_pairs_that_are_equal_after_cutting_are_dropped_and_counted(capsys):
    # item 8: byte-level tokens; "a:" has 2, so 6 tokens leave 4 of each reply
    rows = [dict(prompt="a:", chosen=" one more", rejected=" one less"), dict(prompt="a:", chosen=" two", rejected=" one"), dict(prompt="a:", chosen=" same", rejected=" same")]
    trees = reward_trees(rows, load("tiny")[1], max_len=6, on_long="cut")
    assert [t.row for t in trees] == [1] and [len(r) for r in trees[0].replies] == [5, 5] # 4 and the closing token
    assert "2 of 3 rows were left out" in capsys.readouterr().out
    assert [t.row for t in reward_trees(rows, load("tiny")[1])] == [0, 1]
    with pytest.raises(ValueError, match="row 0: its prompt alone has 2 tokens, max_len=2"): reward_trees(rows, load("tiny")[1], max_len=2, on_long="cut")
    with pytest.raises(ValueError, match="no row is left"): reward_trees(rows[2:], load("tiny")[1])
    with pytest.raises(ValueError, match="needs max_len"): reward_trees(rows, load("tiny")[1], on_long="cut")


def test_a_repeated_reply_is_in_no_pair():
    # item 8, in a ranking: by hand, of b > c > b > d only b > c, b > d, c > d are pairs of different texts
    tokenizer, model = load("tiny")[1], scored()[0]
    tree, = reward_trees([{"prompt": "a", "completions": [" b", " c", " b", " d"], "scores": [4, 3, 2, 1]}], tokenizer)
    batch = pack([tree])
    assert [x.tolist() for x in W.pairs_of(batch)] == [[0, 0, 1], [1, 3, 3]]
    with torch.no_grad(): assert reward_objective().total(reply_scores(model, batch), batch.reply_mask, batch)[1]["accuracy"][1] == 3


def test_the_objective_is_the_ranking_loss_of_each_tree():
    # item 2, item 9: the mean over a prompt's pairs, summed over prompts, from plain forward passes pair by pair; ties give no pair
    model, tokenizer = scored()
    trees = reward_trees(RANKED, tokenizer) + reward_trees(PAIRS[:3], tokenizer)
    batch, goal = batch_trees(trees, model), reward_objective()
    with torch.no_grad(): total, metrics = goal.total(reply_scores(model, batch), batch.reply_mask, batch)
    want, gaps = 0., []
    for row in RANKED + PAIRS[:3]:
        texts, ranks = (row["completions"], (1, 2, 4, 2)) if "completions" in row else ([row["chosen"], row["rejected"]], (1, 2))
        s = plain(model, encode_rows([dict(prompt=row["prompt"], completions=texts)], tokenizer)[0]).tolist()
        own = [a - b for a, i in zip(s, ranks) for b, j in zip(s, ranks) if i < j]
        want, gaps = want + sum(math.log1p(math.exp(-gap)) for gap in own)/len(own), gaps + own
    assert goal.count(batch) == 9 and total.item() == pytest.approx(want, abs=1e-4)
    assert metrics["accuracy"][1] == len(gaps) == 6*5 + 3 and metrics["accuracy"][0].item() == sum(gap > 0 for gap in gaps)
    assert metrics["margin"][0].item() == pytest.approx(sum(gaps), abs=1e-3)


# --- training -----------------------------------------------------------------------------------------------------
def test_one_epoch_and_the_rate_goes_to_zero():
    # item 7: 12 rows, batches of 2: six steps; by default one epoch, and the rate falls in equal steps, to 0 behind the last
    history = train_reward("tiny", PAIRS, batch_size=2, lr=6e-4, warmup=0., **QUIET).history
    rates = [h["learning_rate"] for h in history if "learning_rate" in h]
    falls = [a - b for a, b in zip(rates, rates[1:])]
    assert len(rates) == 6 and falls == pytest.approx([1e-4]*5) and rates[-1] == pytest.approx(falls[-1])


@pytest.mark.parametrize("rows", [PAIRS, RANKED], ids=["pairs", "rankings"])
def test_it_learns_and_its_log_is_its_own_scores(rows):
    # item 9
    reward = train_reward("tiny", rows, lr=1e-3, n_epochs=4, batch_size=4, eval_data=rows, **QUIET)
    evals = [h for h in reward.history if "eval_loss" in h]
    chosen, rejected = reward.pair_scores(rows)
    assert len(chosen) == (12 if rows is PAIRS else 30)
    assert evals[-1]["eval_accuracy"] == pytest.approx((chosen > rejected).float().mean().item()) and evals[-1]["eval_accuracy"] > 0.9 > evals[-1]["eval_loss"]
    assert evals[-1]["eval_margin"] == pytest.approx((chosen - rejected).mean().item(), abs=1e-3)


def test_only_adapter_and_head_are_trained():
    model, tokenizer = load("tiny")
    before = {n: p.clone() for n, p in model.named_parameters()}
    reward = train_reward((model, tokenizer), PAIRS, max_steps=2, lr=1e-3, **QUIET)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(n.endswith((".A", ".B")) or n == "score.weight" for n in trained) and "score.weight" in trained
    now = {n.replace(".base.", "."): p for n, p in model.named_parameters()}
    assert all(now[n].equal(p) for n, p in before.items())
    assert not reward.model.score.weight.equal(add_reward_head(load("tiny")[0]).score.weight)
    again = train_reward((model, tokenizer), PAIRS, max_steps=1, **QUIET) # goes on with adapter and head
    assert again.model is model and again.history[0]["loss"] < math.log(2)


def test_accumulated_batches_are_one_batch():
    # item 38: rankings of unequal numbers of pairs
    rows = RANKED + [dict(r, completions=r["completions"][:2], scores=r["scores"][:2]) for r in RANKED]
    a, b = (train_reward("tiny", rows, max_steps=2, batch_size=n, accumulate=k, lr=1e-3, **QUIET).model for n, k in ((6, 1), (2, 3)))
    for k, v in lora_state(a).items(): assert_close(v, lora_state(b)[k], atol=2e-5, rtol=0)
    assert_close(a.score.weight, b.score.weight, atol=2e-5, rtol=0)


def test_dropout_is_off():
    # item 32
    import transformers
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    model = train_reward((transformers.GPT2LMHeadModel(config), load("tiny")[1]), PAIRS, max_steps=1, **QUIET).model.train()
    batch = batch_trees([closed(t) for t in TREES], model)
    with torch.no_grad(): assert reply_scores(model, batch).equal(reply_scores(model, batch))


def test_a_resumed_run_is_the_same_run(tmp_path):
    import shutil
    options = dict(n_epochs=2, batch_size=4, save_every=2, lr=1e-3, **QUIET)
    whole = train_reward("tiny", PAIRS, tmp_path/"run", **options)
    shutil.copytree(tmp_path/"run", tmp_path/"cut")
    for c in (tmp_path/"cut").glob("checkpoint-*"):
        if int(c.name.split("-")[1]) > 4: shutil.rmtree(c)
    again = train_reward("tiny", PAIRS, tmp_path/"cut", resume=True, **options)
    assert whole.model.score.weight.equal(again.model.score.weight)
    for k, v in lora_state(whole.model).items(): assert v.equal(lora_state(again.model)[k])
    opened = load_reward(tmp_path/"run"/"model", dtype=torch.float32)
    for a, b in zip(opened.pair_scores(PAIRS), whole.pair_scores(PAIRS)): assert_close(a, b, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="other settings"): train_reward("tiny", PAIRS, tmp_path/"cut", resume=True, margin=1., **options)


@pytest.mark.parametrize("rows, options, words", [
    ([{"prompt": "a", "completion": " b", "label": True}], {}, "single replies with labels"), (PAIRS, dict(on_long="shorten"), "on_long='shorten'"),
    (PAIRS, dict(max_len=20), "more than max_len=20"), (PAIRS, dict(method="best"), "method='best'"), (PAIRS, dict(lr=0), "lr=0"), ([], {}, "no rows"),
])
def test_wrong_options(rows, options, words):
    with pytest.raises(ValueError, match=words): train_reward("tiny", rows, **QUIET, **options)


# --- scores in use --------------------------------------------------------------------------------------------------
def test_normalised_scores_have_mean_0_and_standard_deviation_1():
    # item 6
    reward = RewardModel(*scored())
    rows = [dict(prompt=r["prompt"], completion=r[k]) for r in PAIRS for k in ("chosen", "rejected")]
    raw = reward.scores([r["prompt"] for r in rows], [r["completion"] for r in rows])
    for _ in range(2): # a second time changes nothing
        z = reward.normalise(rows).scores([r["prompt"] for r in rows], [r["completion"] for r in rows])
        assert_close(z, (raw - raw.mean())/raw.std(correction=0), atol=1e-4, rtol=0)
    assert z.mean().abs() < 1e-5 and z.square().mean().item() == pytest.approx(1, abs=1e-4)
    assert_close(torch.cat(reward.pair_scores(PAIRS)).sort().values, z.sort().values, atol=1e-5, rtol=0)
    before = (reward.model.score.gain.item(), reward.model.score.bias.item())
    with pytest.raises(ValueError, match="1 replies"): reward.normalise(rows[:1])
    with pytest.raises(ValueError, match="different scores"): reward.normalise(rows[:1]*3)
    assert before == (reward.model.score.gain.item(), reward.model.score.bias.item())


def test_the_saved_model_is_transformers_own(tmp_path):
    # item 3: the same scores from left- and right-padded rows of AutoModelForSequenceClassification, where pad and end token of the tokenizer were one id
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    reward = RewardModel(*scored())
    assert reward.tokenizer.pad_token_id == reward.tokenizer.eos_token_id
    chat = lambda i: [{"role": "user", "content": f"hello {i}" + "!"*i}]
    prompts, replies = [chat(i) for i in range(4)], ["yes", "no, never", "ok", "a long reply, to pad the others"]
    want = reward.scores(prompts, replies)
    reward.save(tmp_path)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.pad_token_id == model.config.pad_token_id != tokenizer.eos_token_id and len(tokenizer) == len(reward.tokenizer)
    texts = [tokenizer.apply_chat_template([*p, {"role": "assistant", "content": r}], tokenize=False).rstrip("\n") for p, r in zip(prompts, replies)]
    for tokenizer.padding_side in ("left", "right"):
        with torch.no_grad(): assert_close(model(**tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)).logits[:, 0], want, atol=1e-5, rtol=0)
    assert reward.tokenizer.pad_token_id == reward.tokenizer.eos_token_id and reward.model.config.pad_token_id == 2 # ours are as they were


def test_gain_and_bias_travel_in_the_config(tmp_path):
    # item 6
    from transformers import AutoModelForSequenceClassification
    reward = RewardModel(*scored())
    raw = torch.cat(reward.pair_scores(PAIRS))
    reward.normalise(PAIRS).save(tmp_path)
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path).config
    want = torch.cat(reward.pair_scores(PAIRS))
    assert_close(raw*config.reward_gain + config.reward_bias, want, atol=1e-4, rtol=0)
    opened = load_reward(tmp_path, dtype=torch.float32)
    assert_close(torch.cat(opened.pair_scores(PAIRS)), want, atol=1e-4, rtol=0)
    assert batch_trees([closed(t) for t in TREES], opened.model).share # by trees, as before


def test_a_16_bit_base_is_saved_without_rounding(tmp_path):
    model, tokenizer = load("tiny", dtype=torch.bfloat16)
    add_lora(model, 4, 8)
    for p in lora_parameters(model): p.data += 0.05*torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    reward = RewardModel(add_reward_head(model), tokenizer)
    reward.save(tmp_path)
    exact, rounded = load_reward(tmp_path, dtype=torch.float32), reward.pair_scores(PAIRS)[0]
    assert next(reward.model.parameters()).dtype == torch.bfloat16 # ours is as it was
    want = RewardModel(reward.model.float(), tokenizer).pair_scores(PAIRS)[0]
    assert_close(exact.pair_scores(PAIRS)[0], want, atol=1e-4, rtol=0)
    assert (rounded - want).abs().max() > 1e-3


def test_a_tokenizer_without_a_free_special_token(tmp_path, monkeypatch):
    "GPT-2's case: rows are scored one at a time, as Transformers asks for; no token is added."
    from types import SimpleNamespace
    from transformers import AutoModelForSequenceClassification
    gpt2 = dict(bos_token_id=2, eos_token_id=2, pad_token_id=2, all_special_ids=[2], added_tokens_decoder={2: "<|endoftext|>"}, chat_template=None)
    assert W._free_pad_id(SimpleNamespace(**gpt2)) is None
    assert W._free_pad_id(SimpleNamespace(**{**gpt2, "pad_token_id": 7})) == 7 # its own pad, where it is free
    monkeypatch.setattr(W, "_free_pad_id", lambda tokenizer: None)
    reward = RewardModel(*scored())
    model = AutoModelForSequenceClassification.from_pretrained(reward.save(tmp_path))
    ids = torch.tensor([TREES[0].prompt_ids + TREES[0].replies[0]])
    with torch.no_grad(): assert_close(model(input_ids=ids).logits[0], plain(reward.model, TREES[0])[:1], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="no padding token"): model(input_ids=ids.repeat(2, 1))


def test_other_folders_are_refused(tmp_path):
    load("tiny")[0].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no head"): load_reward(tmp_path)


# --- calibration and length -----------------------------------------------------------------------------------------
def test_calibration_by_hand():
    "Margins ln 3 and ln 9: predicted 75 % and 90 %."
    a, b = math.log(3), math.log(9)
    chosen, rejected = torch.tensor([a, a, 0., a, b, 0.], dtype=torch.float64), torch.tensor([0., 0., a, 0., 0., b], dtype=torch.float64)
    bins, ece = calibration(chosen, rejected, n_bins=3)
    assert [tuple(round(x, 6) for x in b) for b in bins] == [(0.75, 0.75, 4), (0.9, 0.5, 2)] and ece == pytest.approx(2/6*0.4)
    assert calibration(torch.zeros(4), torch.zeros(4)) == ([(0.5, 0.5, 4)], 0.) # a coin that knows it


def test_length_bias_against_numpy():
    import numpy as np
    g = np.random.default_rng(0)
    groups, x = g.integers(0, 5, 60), g.normal(size=60)*4
    s = 0.3*x + 10*groups + g.normal(size=60)
    dummies = np.eye(5)[groups]
    slope = np.linalg.lstsq(np.column_stack([x, dummies]), s, rcond=None)[0][0]
    rest = lambda v: v - dummies @ np.linalg.lstsq(dummies, v, rcond=None)[0]
    assert length_bias(torch.tensor(s), torch.tensor(x), torch.tensor(groups)) == pytest.approx((slope, np.corrcoef(rest(s), rest(x))[0, 1]))
    assert length_bias(torch.tensor(s), torch.tensor(x)) == pytest.approx((np.polyfit(x, s, 1)[0], np.corrcoef(x, s)[0, 1]))


def test_balanced_pairs():
    rows = [dict(prompt=str(i), chosen="x"*a, rejected="y"*b) for i, (a, b) in enumerate([(5, 4), (6, 5), (7, 6), (4, 5), (9, 1), (3, 3), (1, 9), (9, 6), (2, 9)])]
    kept = balance_lengths(rows)
    assert len(kept) == 5 and [r["prompt"] for r in kept if r["prompt"] not in "012"] == ["3", "4", "5", "6"]
    count = {}
    for r in kept: count.setdefault(abs(len(r["chosen"]) - len(r["rejected"])).bit_length(), []).append(len(r["chosen"]) > len(r["rejected"]))
    # differences 1: three longer, one shorter; 8: one each; 3: one longer; 7: one shorter; 0: one tie
    assert sorted(count[1]) == [False, True] and sorted(count[4]) == [False, True] and count[0] == [False] and 2 not in count and 3 not in count
    assert kept == balance_lengths(rows) and [rows.index(r) for r in kept] == sorted(rows.index(r) for r in kept)
    chats = [dict(prompt="a", **{k: [{"role": "assistant", "content": r[k]}] for k in ("chosen", "rejected")}) for r in rows]
    assert [r["chosen"][0]["content"] for r in balance_lengths(chats)] == [r["chosen"] for r in kept]


def test_a_length_bias_is_learnt_and_lessened():
    "Right and long replies win; at equal quality a longer reply then has the higher score, by less on balanced pairs."
    import random
    draw, rows = random.Random(1), []
    for i in range(300):
        two = [(draw.random() < .5, draw.randrange(5)) for _ in range(2)]
        gap = sum(s*(2*good + words) for s, (good, words) in zip((1, -1), two))
        if draw.random() > 1/(1 + math.exp(-gap)): two = two[::-1]
        rows.append(dict(zip(("prompt", "chosen", "rejected"), (f"Q{i}:", *((" yes" if good else " no") + " indeed"*words for good, words in two)))))
    n_words, slopes = lambda text: len(text.split()), []
    for data in (rows, balance_lengths(rows, n_words)):
        reward = train_reward("tiny", data, method="full", lr=1e-3, batch_size=16, max_steps=20, **QUIET)
        scores = reward.scores(["Q7:"]*10, [w + " indeed"*n for w in (" no", " yes") for n in range(5)])
        slopes.append(length_bias(scores, torch.arange(5).repeat(2), torch.arange(2).repeat_interleave(5))[0])
    assert slopes[0] > 0.5 and abs(slopes[1]) < slopes[0]/2, slopes


# --- TRL -------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_loss_is_trls(tmp_path):
    "TRL's RewardTrainer on the saved model: its loss, accuracy and gradient of the head, with and without margins."
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    reward = RewardModel(*scored())
    chosen, rejected = reward.pair_scores(PAIRS)
    reward.save(tmp_path/"model")
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(tmp_path/"model"), AutoTokenizer.from_pretrained(tmp_path/"model")
    for margin in (0., 0.75):
        rows = [dict(chosen=r["prompt"] + r["chosen"] + tokenizer.eos_token, rejected=r["prompt"] + r["rejected"] + tokenizer.eos_token, margin=margin) for r in PAIRS]
        args = trl.RewardConfig(output_dir=str(tmp_path/"out"), per_device_train_batch_size=12, use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False, disable_tqdm=True)
        trainer = trl.RewardTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=Dataset.from_list(rows))
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(12)])
        theirs = trainer.compute_loss(model, batch)
        assert theirs.item() == pytest.approx(bradley_terry_loss(chosen, rejected, margin).item(), abs=1e-5)
        model.zero_grad()
        theirs.backward()
        trees = reward_trees(PAIRS, reward.tokenizer)
        b = batch_trees(trees, reward.model)
        reward.model.zero_grad()
        (reward_objective(margin).total(reply_scores(reward.model, b), b.reply_mask, b)[0]/12).backward()
        assert_close(reward.model.score.weight.grad, model.score.weight.grad[0], atol=1e-5, rtol=1e-4)
