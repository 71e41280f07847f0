"""Training on preferences: data of every kind, objectives on trees, references, and the same numbers as plain forward passes and as TRL."""
import json, math, os, subprocess, sys, tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ftcourse.align.prefer as P
from ftcourse.align.objectives import METHODS
from ftcourse.align.prefer import make_objective, no_dropout, pair_fields, pairs_of, prefer, preference_rows, preference_trees, sampled_kl, with_reference
from ftcourse.data.batches import Tree, encode_rows, pack
from ftcourse.data.sets import load_set
from ftcourse.models import load
from ftcourse.tune.lora import add_lora, adapters_off, has_lora, lora_parameters, lora_state
from ftcourse.tune.trainer import Run, TreeTrainer
from ftcourse.tune.trees import batch_trees, reply_logps

ROOT = Path(__file__).resolve().parent.parent
PAIRS = [{"prompt": f"number {i} is", "chosen": f" good {i}", "rejected": " bad" + " and worse"*(i % 3)} for i in range(12)]
LABELS = [{"prompt": f"number {i} is", "completion": f" reply {i}", "label": i % 2 == 0} for i in range(12)]
RANKED = [{"prompt": f"number {i} is", "completions": [" best", f" fair {i}", " worst of all"], "scores": [3, 2, 0.5]} for i in range(6)]
QUIET = dict(progress=False, dtype=torch.float32)


def moved(seed=0):
    "A tiny model whose adapter isn't zero."
    model, tokenizer = load("tiny")
    add_lora(model, 4, 8)
    gen = torch.Generator().manual_seed(seed)
    for p in lora_parameters(model): p.data += 0.05*torch.randn(p.shape, generator=gen)
    return model, tokenizer


def plain(model, tree, k):
    "Summed log-probability of a reply by one forward pass over prompt and reply alone."
    ids, p = torch.tensor([tree.prompt_ids + tree.replies[k]]), len(tree.prompt_ids)
    return model(input_ids=ids).logits[0, p-1:-1].log_softmax(-1).gather(-1, ids[0, p:, None]).sum()


# --- data ----------------------------------------------------------------------------------------------------
def test_every_spelling_of_a_pair_becomes_the_same_row():
    user, good, bad = [{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": "Hello!"}], [{"role": "assistant", "content": "What?"}]
    want = {"prompt": user, "chosen": good, "rejected": bad}
    for row in (want, {"chosen": user + good, "rejected": user + bad}, {"prompt": "Hi", "chosen": user + good, "rejected": user + bad},
                {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!", "rejected": "\n\nHuman: Hi\n\nAssistant: What?"},
                {"instruction": "Hi", "input": "", "output": "Hello!", "chosen": "Hello!", "rejected": "What?"}):
        (found,), kind = preference_rows([row])
        assert kind == "pairs" and {k: found[k] for k in want} == want, row


def test_identical_pairs_are_left_out_and_counted(capsys):
    "Six of the set's 1,100 pairs hold one text twice (counted by hand from the file)."
    rows, _ = preference_rows("preferences")
    same = [i for i, r in enumerate(json.loads((ROOT/"data/preferences/preferences-1100.json").read_text())) if r["chosen"] == r["rejected"]]
    trees = preference_trees(rows, load("tiny")[1])
    assert len(same) == 6 and len(trees) == 1094 and not set(same) & {t.row for t in trees}
    assert "6 of 1100 rows were left out" in capsys.readouterr().out


@pytest.mark.parametrize("rows, words", [
    ([], "no rows"),
    ([PAIRS[0], LABELS[0]], "row 1 holds labels"),
    ([PAIRS[0], {"prompt": "a", "chosen": "", "rejected": " b"}], "row 1: it has an empty reply"),
    ([{"prompt": "a", "completion": " b", "label": "yes"}], "label is 'yes'"),
    ([{"prompt": "a", "completion": " b", "label": 1}], "label is 1"),
    ([{"prompt": "a", "completions": [" b", " c"], "scores": [1]}], "2 completions but 1 scores"),
    ([{"prompt": "a", "completions": [" b", " c"], "scores": [1, math.nan]}], "nan"),
    ([{"prompt": "a", "completions": [" b", " c"], "scores": [1, 1]}], "no row is left"),
    ([{"messages": [{"role": "user", "content": "a"}]}], "kind 'messages'"),
    ([{"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "rejected": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "c"}]}], "differ from message 0"),
])
def test_bad_rows_say_what_and_where(rows, words):
    # item 48
    with pytest.raises(ValueError, match=words): prefer("tiny", rows, **QUIET)


def test_prompts_that_do_not_prefix_are_refused(monkeypatch):
    # item 47: a tokenizer that joins across the border would train under a prompt that is never seen
    _, tokenizer = load("tiny")
    call = type(tokenizer).__call__
    joined = lambda self, text, **kw: call(self, text.replace("ab", "X"), **kw)
    monkeypatch.setattr(type(tokenizer), "__call__", joined)
    with pytest.raises(ValueError, match="joins the prompt's end"): preference_trees([{"prompt": "a", "chosen": "b", "rejected": "c"}], tokenizer)


def test_long_rows_are_an_error_or_dropped_aloud(capsys):
    rows = [*PAIRS, {"prompt": "x"*90, "chosen": " a", "rejected": " b"}]
    with pytest.raises(ValueError, match=r"row 12: prompt and reply have \d+ tokens"): prefer("tiny", rows, max_len=60, **QUIET)
    bot = prefer("tiny", rows, max_len=60, on_long="drop", max_steps=1, **QUIET)
    assert "1 of 13 rows are longer than 60 tokens and were dropped" in capsys.readouterr().out and bot.history


@pytest.mark.parametrize("options, words", [
    (dict(objective="dppo"), "no objective 'dppo'"), (dict(betta=1), "no parameter betta"), (dict(beta="1"), "must be a finite number"), (dict(reference="later"), "reference='later'"),
    (dict(method="full", reference="online"), "switches a new adapter off"), (dict(method="best"), "method='best'"), (dict(eval_data=LABELS), "eval_data holds labels"),
    (dict(lr=0), "lr"), (dict(on_long="cut"), "on_long"), (dict(max_len=1), "max_len=1"),
])
def test_wrong_options(options, words):
    with pytest.raises(ValueError, match=words): prefer("tiny", PAIRS, **QUIET, **options)


def test_each_objective_takes_the_data_it_can_learn_from():
    for name, method in METHODS.items():
        for rows, kind in ((PAIRS, "pairs"), (LABELS, "labels"), (RANKED, "ranking")):
            fits = kind == "pairs" or (kind == "labels") == (method.data == "labels")
            if fits: assert math.isfinite(prefer("tiny", rows, objective=name, max_steps=1, batch_size=4, **QUIET).history[0]["loss"]), (name, kind)
            else:
                with pytest.raises(ValueError, match=f"{name} learns from {method.data}, but the rows hold {kind}"): prefer("tiny", rows, objective=name, **QUIET)


def test_kto_refuses_what_has_no_reference_point(capsys):
    # item 80: one row has no mismatched partner to estimate z from
    with pytest.raises(ValueError, match="batch_size=1"): prefer("tiny", LABELS, objective="kto", batch_size=1, **QUIET)
    with pytest.raises(ValueError, match="all 6 labels are True"): prefer("tiny", LABELS[::2], objective="kto", **QUIET)
    prefer("tiny", LABELS[:6] + LABELS[6::2], objective="kto", max_steps=1, **QUIET)
    assert "good replies weigh 2.00 times" in capsys.readouterr().out  # item 84: 6 good, 3 bad


# --- from trees to losses ----------------------------------------------------------------------------------
def test_pairs_by_hand():
    a = Tree((1,), ((2,), (3,), (4,)), ((1,),)*3, 0, (1., 3., 1.))
    b = Tree((1,), ((2,), (3,)), ((1,),)*2, 1, (0., math.nan))
    c = Tree((1,), ((2,), (3,)), ((1,),)*2, 2, (0., 1.))
    assert [x.tolist() for x in pairs_of(pack([a, b, c]))] == [[1, 1, 6], [0, 2, 5]]


def test_a_ranking_is_all_of_its_pairs():
    model, tokenizer = moved()
    trees = preference_trees(RANKED, tokenizer)
    single = preference_trees([dict(prompt=r["prompt"], chosen=r["completions"][i], rejected=r["completions"][j]) for r in RANKED for i, j in ((0, 1), (0, 2), (1, 2))], tokenizer)
    goal = make_objective("simpo")
    whole, parts = batch_trees(trees, model), batch_trees(single, model)
    assert goal.count(whole) == goal.count(parts) == 18
    with torch.no_grad(): assert goal.total(*reply_logps(model, whole), whole)[0].item() == pytest.approx(goal.total(*reply_logps(model, parts), parts)[0].item(), abs=1e-4)


def test_fields_are_sums_and_means_over_what_counts():
    # item 53, item 65: sums over the reply's tokens; means divide by the mask's count, also where log-probabilities are 0
    tree = Tree((1, 2), ((3, 4, 5), (6, 7)), ((1, 1, 1), (1, 1)), 0, (1., 0.))
    batch = replace(pack([tree]), ref_logps=torch.tensor([-3., -5.]))
    token_logps, mask = torch.tensor([[0., -1., -2.], [-4., 0., 0.]]), batch.reply_mask
    f = pair_fields(token_logps, mask, batch)
    assert {k: v.item() for k, v in f.items()} == dict(chosen_logps=-3., chosen_len=3., chosen_mean_logps=-1., ref_chosen_logps=-3.,
                                                       rejected_logps=-4., rejected_len=2., rejected_mean_logps=-2., ref_rejected_logps=-5., nll=1.)


def test_metrics_by_hand():
    # item 59: reward = beta*(log π - log π_ref), detached; a tie is no hit
    f = {"chosen_logps": torch.tensor([-10., -8.], requires_grad=True), "rejected_logps": torch.tensor([-9., -7.]), "ref_chosen_logps": torch.tensor([-12., -8.]),
         "ref_rejected_logps": torch.tensor([-6., -7.]), "chosen_len": torch.tensor([4., 2.]), "rejected_len": torch.tensor([3., 5.])}
    m = P.pair_metrics(METHODS["dpo"], {"beta": 0.5}, f)
    assert not any(v.requires_grad for v in m.values())
    assert {k: v.item() for k, v in m.items()} == dict(chosen_rewards=1., rejected_rewards=-1.5, margin=2.5, accuracy=1., chosen_logps=-18., rejected_logps=-16., chosen_len=6., rejected_len=8., logratios=-0.5)


@pytest.mark.parametrize("name", [n for n in METHODS if METHODS[n].data == "pairs"])
def test_objectives_on_trees_equal_plain_forward_passes(name):
    "Every loss on pairs: prompts shared in a tree against each reply alone (its numbers then go into the loss, whose own tests stand elsewhere)."
    # item 61
    model, tokenizer = moved()
    trees, method = preference_trees(PAIRS, tokenizer), METHODS[name]
    with torch.no_grad():
        (c, r), n = (torch.stack([plain(model, t, k) for t in trees]) for k in (0, 1)), torch.tensor([[sum(m) for m in t.masks] for t in trees]).float()
        with adapters_off(model): rc, rr = (torch.stack([plain(model, t, k) for t in trees]) for k in (0, 1))
    known = dict(chosen_logps=c, rejected_logps=r, ref_chosen_logps=rc, ref_rejected_logps=rr, chosen_len=n[:, 0], rejected_len=n[:, 1],
                 chosen_mean_logps=c/n[:, 0], rejected_mean_logps=r/n[:, 1], nll=-c/n[:, 0])
    import inspect
    wanted = [k for k, p in inspect.signature(method.function()).parameters.items() if p.default is p.empty]
    expected = method.function()(**{k: known[k] for k in wanted}, **{k: p.default for k, p in method.parameters.items()})
    trainer = TreeTrainer(model, make_objective(name), trees, trees, run=Run(batch_size=5, progress=False))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), abs=2e-5, rel=1e-5)


def test_simpo_asks_for_no_reference(monkeypatch):
    # item 71
    monkeypatch.setattr(P, "with_reference", lambda *a, **k: pytest.fail("a reference was asked"))
    monkeypatch.setattr("ftcourse.tune.trainer.adapters_off", lambda model: pytest.fail("the adapters were switched off"))
    for name in ("simpo", "orpo", "cpo", "slic", "rrhf"): prefer("tiny", PAIRS, objective=name, n_epochs=1, **QUIET)


@pytest.mark.parametrize("name", ["dpo", "cdpo", "robust", "ipo", "kto"])
def test_the_first_step_of_a_run_is_the_published_one(name):
    # item 57: ln 2, no reward, no margin; item 64: 1/(4 tau^2); item 81: half the weight
    first = prefer("tiny", PAIRS, objective=name, max_steps=1, **QUIET).history[0]
    assert first["loss"] == pytest.approx({"ipo": 25., "kto": 0.5}.get(name, math.log(2)), abs=1e-3 if name == "ipo" else 1e-5)
    assert first["margin"] == pytest.approx(0, abs=1e-5)


def test_training_moves_what_it_should():
    # item 58, item 63: the margin rises; chosen and rejected log-probabilities are logged beside it, whichever way they go
    history = prefer("tiny", PAIRS, objective="dpo", lr=3e-3, n_epochs=6, batch_size=6, eval_data=PAIRS, eval_every=4, **QUIET).history
    evals = [h for h in history if "eval_margin" in h]
    assert evals[-1]["eval_margin"] > evals[0]["eval_margin"] > 0 and evals[-1]["eval_accuracy"] == 1 and evals[-1]["eval_loss"] < 0.6
    gap = lambda h: h["eval_chosen_logps"] - h["eval_rejected_logps"]
    assert (gap(evals[-1]) - gap(evals[0]))*0.1 == pytest.approx(evals[-1]["eval_margin"] - evals[0]["eval_margin"], abs=1e-4)


def test_accumulated_batches_are_one_batch():
    # item 38, item 85: KTO's mismatched pairs are the data's, whatever the batches
    runs = [prefer("tiny", PAIRS, objective="dpo", max_steps=3, batch_size=b, accumulate=k, lr=1e-3, **QUIET) for b, k in ((8, 1), (2, 4))]
    a, b = (lora_state(r.model) for r in runs)
    for k in a: torch.testing.assert_close(a[k], b[k], atol=2e-5, rtol=0)


def test_dropout_is_off_in_training():
    # item 75
    import transformers
    config = transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    model = transformers.GPT2LMHeadModel(config).train()
    ids = torch.arange(8)[None]
    assert not model(input_ids=ids).logits.equal(model(input_ids=ids).logits)
    no_dropout(model)
    assert model.training and model(input_ids=ids).logits.equal(model(input_ids=ids).logits)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, attention_dropout=0.5)).train()
    no_dropout(llama)
    assert llama(input_ids=ids).logits.equal(llama(input_ids=ids).logits)


def test_prefer_switches_dropout_off():
    # item 75
    import transformers
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, attention_dropout=0.5)
    first = prefer((transformers.LlamaForCausalLM(config), load("tiny")[1]), PAIRS, max_steps=1, reference="online", **QUIET).history[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)


# --- the reference -----------------------------------------------------------------------------------------
def test_adapters_off_is_the_base_and_the_cache_is_the_same():
    # item 62
    base, tokenizer = load("tiny")
    model, _ = moved()
    trees = preference_trees(PAIRS, tokenizer)
    with torch.no_grad():
        expected = [[plain(base, t, k).item() for k in (0, 1)] for t in trees]
        batch = batch_trees(trees, model)
        with adapters_off(model): off = reply_logps(model, batch)[0].sum(1).view(-1, 2)
    torch.testing.assert_close(off, torch.tensor(expected), atol=1e-4, rtol=0)
    cached = with_reference(base, trees, max_tokens=60)
    torch.testing.assert_close(torch.tensor([t.ref_logps for t in cached]), torch.tensor(expected), atol=1e-4, rtol=0)
    assert [replace(t, ref_logps=()) for t in cached] == trees


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_online_and_cached_runs_are_the_same_run(objective):
    # item 62
    a, b = (prefer("tiny", PAIRS, objective=objective, reference=r, max_steps=4, lr=3e-3, batch_size=6, eval_data=PAIRS[:5], **QUIET).history for r in ("online", "cached"))
    for x, y in zip(a, b):
        for key in ("loss", "margin", "eval_loss"):
            if key in x: assert x[key] == pytest.approx(y[key], abs=2e-5)


def test_the_reference_is_the_model_as_it_was_given():
    "An adapter that is trained on has its own beginning for a reference, not the base."
    model, tokenizer = moved()
    trees = preference_trees(PAIRS, tokenizer)
    with torch.no_grad(): start = [plain(model, t, 0).item() for t in trees]
    before = {k: v.clone() for k, v in lora_state(model).items()}
    with pytest.raises(ValueError, match="first adapter"): prefer((model, tokenizer), PAIRS, reference="online", **QUIET)
    bot = prefer((model, tokenizer), PAIRS, max_steps=2, lr=1e-3, batch_size=12, **QUIET)
    assert bot.model is model and has_lora(model) and any(not v.equal(before[k]) for k, v in lora_state(model).items())
    assert bot.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and bot.history[0]["chosen_logps"] == pytest.approx(sum(start)/len(start), abs=1e-3)


def test_full_training_needs_no_second_model():
    bot = prefer("tiny", PAIRS, method="full", max_steps=2, lr=1e-3, progress=False, dtype=torch.bfloat16)
    assert bot.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # the reference was asked in float32 too
    assert all(p.requires_grad and p.dtype == torch.float32 for p in bot.model.parameters())
    with pytest.raises(ValueError, match="has an adapter"): prefer(moved(), PAIRS, method="full", **QUIET)


def test_auto_asks_for_the_cheaper_reference(monkeypatch):
    asked = []
    real = P.with_reference
    monkeypatch.setattr(P, "with_reference", lambda *a, **k: asked.append(1) or real(*a, **k))
    prefer("tiny", PAIRS, max_steps=1, batch_size=4, **QUIET)
    assert not asked  # 4 of 12 rows are seen: once each at their step is less than all of them before
    prefer("tiny", PAIRS, n_epochs=1, batch_size=4, **QUIET)
    assert asked


@pytest.mark.parametrize("what", ["model", "data", "template"])
def test_a_stale_cache_is_noticed(what, tmp_path, capsys, monkeypatch):
    (model, tokenizer), path = load("tiny"), tmp_path/"reference.safetensors"
    trees = preference_trees(PAIRS, tokenizer)
    first = with_reference(model, trees, path=path, template="one")
    calls = []
    real = P._all_logps
    monkeypatch.setattr(P, "_all_logps", lambda *a: calls.append(1) or real(*a))
    assert with_reference(model, trees, path=path, template="one") == first and not calls and not capsys.readouterr().out
    if what == "model": model.model.layers[1].mlp.up_proj.weight.data += 0.05
    if what == "data": trees = trees[1:]
    again = with_reference(model, trees, path=path, template="two" if what == "template" else "one")
    assert calls and f"computed for another {what}" in capsys.readouterr().out
    assert again == with_reference(model, trees)  # and what it holds now is right
    assert (again == first) == (what == "template")


def test_a_cache_of_swapped_replies_is_stale(tmp_path, capsys):
    (model, tokenizer), path = load("tiny"), tmp_path/"reference.safetensors"
    trees = preference_trees(PAIRS, tokenizer)
    with_reference(model, trees, path=path)
    with_reference(model, [replace(t, replies=t.replies[::-1], masks=t.masks[::-1]) for t in trees], path=path)
    assert "another data" in capsys.readouterr().out


# --- runs ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("objective", ["dpo", "kto", "simpo"])
def test_a_resumed_run_is_the_same_run(objective, tmp_path):
    import shutil
    options = dict(objective=objective, n_epochs=2, batch_size=4, save_every=2, lr=1e-3, **QUIET)
    whole = prefer("tiny", PAIRS, tmp_path/"run", **options)
    shutil.copytree(tmp_path/"run", tmp_path/"cut")
    for c in (tmp_path/"cut").glob("checkpoint-*"):
        if int(c.name.split("-")[1]) > 4: shutil.rmtree(c)
    config = json.loads((tmp_path/"cut"/"config.json").read_text())
    assert config["objective"] == objective and config["parameters"] == {k: p.default for k, p in METHODS[objective].parameters.items()}
    again = prefer("tiny", PAIRS, tmp_path/"cut", resume=True, **options)
    for (k, a), b in zip(lora_state(whole.model).items(), lora_state(again.model).values()): assert a.equal(b), k
    if METHODS[objective].parameters:
        name, p = next(iter(METHODS[objective].parameters.items()))
        with pytest.raises(ValueError, match="other settings"): prefer("tiny", PAIRS, tmp_path/"cut", resume=True, **options, **{name: 2*p.default})


def test_what_is_saved_opens_again(tmp_path):
    rows = [{"prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"hello {i}"}], "chosen": [{"role": "assistant", "content": "hi"}],
             "rejected": [{"role": "assistant", "content": "go away"}]} for i in range(8)]
    bot = prefer("tiny", rows, tmp_path/"run", lr=1e-2, n_epochs=4, **QUIET)
    assert bot.system == "Be kind." and {"adapter_config.json", "reference.safetensors", "ftcourse.json", "curves.png"} <= {p.name for p in (tmp_path/"run").iterdir()}
    model, tokenizer = load(tmp_path/"run", dtype=torch.float32)
    tree, = encode_rows([{"prompt": rows[0]["prompt"], "completion": rows[0]["chosen"]}], tokenizer)
    with torch.no_grad(): assert plain(model, tree, 0).item() == pytest.approx(plain(bot.model, tree, 0).item(), abs=1e-4)


def test_sampled_kl_against_the_whole_vocabulary():
    model, tokenizer = moved()
    kl, se = sampled_kl(model, tokenizer, ["2 + 2 ="]*600, max_new_tokens=1, batch_size=200)
    ids = torch.tensor([tokenizer("2 + 2 =")["input_ids"]])
    with torch.no_grad():
        p = model(input_ids=ids).logits[0, -1].log_softmax(-1)
        with adapters_off(model): q = model(input_ids=ids).logits[0, -1].log_softmax(-1)
    assert abs(kl - (p.exp()*(p - q)).sum().item()) < 4*se and kl != 0


TWO = """
import sys; sys.path.insert(0, {tests!r})
import torch
from test_prefer import QUIET, UNEVEN, prefer, lora_state
bot = prefer("tiny", UNEVEN, sys.argv[1], objective="kto", batch_size=8, n_epochs=2, lr=1e-3, eval_data=UNEVEN[:6], eval_every=1, **QUIET)
if torch.distributed.get_rank() == 0: torch.save((bot.history, lora_state(bot.model)), sys.argv[2])
"""
UNEVEN = [{**row, "completion": row["completion"]*(1 + i % 4)} for i, row in enumerate(LABELS)] + LABELS[:4]


@pytest.mark.slow
def test_two_processes_share_one_reference_point(tmp_path):
    # item 77: z is the mean over all processes; rows of uneven lengths would show a mean of means
    one = prefer("tiny", UNEVEN, objective="kto", batch_size=8, n_epochs=2, lr=1e-3, eval_data=UNEVEN[:6], eval_every=1, **QUIET)
    (tmp_path/"two.py").write_text(TWO.format(tests=str(ROOT/"tests")))
    package = Path(P.__file__).resolve().parents[2]  # the one under test, which isn't the checkout's in a sabotage run
    env = dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTHONPATH=f"{package}{os.pathsep}{ROOT/'tests'}")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29617", str(tmp_path/"two.py"), str(tmp_path/"run"), str(tmp_path/"result.pt")],
                          env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    history, weights = torch.load(tmp_path/"result.pt")
    for key in ("loss", "kl", "eval_loss", "eval_kl", "eval_desirable_rewards"):
        assert [h[key] for h in one.history if key in h] == pytest.approx([h[key] for h in history if key in h], abs=2e-5), key
    for k, w in lora_state(one.model).items(): torch.testing.assert_close(w, weights[k], atol=1e-5, rtol=0)


# --- TRL -----------------------------------------------------------------------------------------------------
N, STEPS = 2, 8


def text_rows(tokenizer, n):
    "Pairs as plain texts with the template written out, so that both libraries see the same ids."
    rows = []
    for r in load_set("preferences")[:n]:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": (r["instruction"] + "\n" + r["input"]).strip()}], tokenize=False, add_generation_prompt=True)
        rows.append(dict(prompt=prompt, chosen=r["chosen"] + tokenizer.eos_token, rejected=r["rejected"] + tokenizer.eos_token))
    return rows


def trl_run(folder, adapter, rows, dtype):
    "TRL's references of all rows, and the losses of its first optimiser steps from a saved adapter, rows in order."
    from datasets import Dataset
    from peft import PeftModel
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    args = DPOConfig(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=N, max_steps=STEPS, learning_rate=1e-4, beta=0.1, bf16=False, use_cpu=True, max_length=512, logging_steps=1,
                     gradient_checkpointing=False, precompute_ref_log_probs=True, save_strategy="no", report_to=[], disable_tqdm=True)
    trainer = DPOTrainer(model=model, args=args, processing_class=AutoTokenizer.from_pretrained(folder), train_dataset=Dataset.from_list(rows))
    trainer._get_train_sampler = lambda *a, **k: SequentialSampler(trainer.train_dataset)
    trainer.train()
    ref = torch.tensor([[r["ref_chosen_logps"], r["ref_rejected_logps"]] for r in trainer.train_dataset])
    return ref, [h["loss"] for h in trainer.state.log_history if "loss" in h]


@pytest.mark.slow
@pytest.mark.real
def test_the_same_run_as_trl(tmp_path, monkeypatch):
    "In float32 every reference log-probability to 1e-3 and the losses of the first 8 optimiser steps to 1e-4; in bf16 the references no farther from float32 than TRL's, as far as 32 replies can tell."
    from ftcourse.tune.lora import save_adapter
    import ftcourse.tune.trainer as T
    for dtype in (torch.float32, torch.bfloat16):
        model, tokenizer = load("smollm2-135m", device="cpu", dtype=dtype)
        rows, folder = text_rows(tokenizer, N*STEPS), tmp_path/str(dtype)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        trees = preference_trees(rows, tokenizer)
        add_lora(model, 8, 16)
        for p in lora_parameters(model)[1::2]: p.data += 0.01*torch.randn(p.shape, generator=torch.Generator().manual_seed(p.shape[0]))  # B: the adapter says something
        save_adapter(model, folder/"adapter")
        trees = with_reference(model, trees)  # TRL's reference, too, is a given adapter as it was, not the base
        mine = torch.tensor([t.ref_logps for t in trees])
        theirs, losses = trl_run(folder, folder/"adapter", rows, dtype)
        if dtype == torch.float32:
            exact = mine
            assert (mine - theirs).abs().max() < 1e-3
            monkeypatch.setattr(T.EpochBatches, "__iter__", lambda self: iter([list(range(i, i + N)) for i in range(0, self.n, N)]))
            run = Run(lr=1e-4, max_steps=STEPS, batch_size=N, warmup=0.0, progress=False)
            history = TreeTrainer(model, make_objective("dpo", beta=0.1), trees, run=run).fit()
            assert [h["loss"] for h in history if "loss" in h] == pytest.approx(losses, abs=1e-4)
            assert max(losses) - min(losses) > 0.01  # and they say something
        else: theirs, mine = ((x - exact).abs().flatten() for x in (theirs, mine))  # (32,) errors of whole replies, nats
    farther = mine - theirs
    print(f"bf16 from float32: TRL {theirs.mean():.3f}, ours {mine.mean():.3f} nats a reply, difference {farther.mean():+.3f} ± {farther.std()/len(farther)**.5:.3f}")
    assert farther.mean() <= 3*farther.std()/len(farther)**.5
