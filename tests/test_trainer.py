"""The trainer: exact accumulation, exact resume after any kill, stops that say why, two processes like one."""
import errno, json, os, random, re, shutil, signal, subprocess, sys, textwrap, time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import TrainerCallback

from ftcourse.data.batches import encode_rows
from ftcourse.models import load
from ftcourse.tune import trainer as T
from ftcourse.tune.lora import add_lora, lora_parameters, lora_state
from ftcourse.tune.trainer import EpochBatches, Interrupted, Objective, Run, TreeTrainer, checkpoints, rate

ROOT = Path(__file__).resolve().parent.parent
OBJECTIVE = Objective("sft", lambda logps, mask, batch: (-(logps*mask).sum(), {}), lambda batch: batch.n_tokens, unit="nats per token", accuracy=True)
QUIET = dict(progress=False, warmup=0.0, schedule="constant")


def rows_of(n, seed=0):
    "Chats whose replies have very different lengths: a mean of means would show."
    rng = random.Random(seed)
    word = lambda: "".join(rng.choice("abcdefgh") for _ in range(rng.randint(1, 6)))
    return [{"messages": [{"role": "user", "content": " ".join(word() for _ in range(rng.randint(1, 8)))},
                          {"role": "assistant", "content": " ".join(word() for _ in range(rng.choice([1, 2, 15])))}]} for _ in range(n)]


def make(n=12, out=None, dropout=0.0, eval_n=0, objective=OBJECTIVE, callbacks=None, **run):
    model, tokenizer = load("tiny")
    add_lora(model, 4, 8, dropout=dropout, seed=1)
    gen = torch.Generator().manual_seed(3)
    for p in lora_parameters(model): p.data += 0.02*torch.randn(p.shape, generator=gen)  # so that B isn't 0 and every gradient lives
    trees = encode_rows(rows_of(n), tokenizer)
    return TreeTrainer(model, objective, trees, encode_rows(rows_of(eval_n, 9), tokenizer) or None, out, Run(**{**QUIET, **run}), callbacks=callbacks)


class Gradients(TrainerCallback):
    "Keeps the gradients of each step, before they are used."
    def __init__(self): self.steps = []
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def gradients(**kwargs):
    keep = Gradients()
    history = make(callbacks=[keep], max_grad_norm=1e9, **kwargs).fit()
    return keep.steps, history


def weights(trainer): return {k: v.clone() for k, v in lora_state(trainer.model.model).items()}


def same(a, b): return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


# --- what is minimised -------------------------------------------------------------------------------------
def plain_gradients(n):
    "Loss and gradients of all rows by the model's own logits, one row at a time, and F.cross_entropy."
    t = make(n)
    model = t.model.model
    total, count = 0., 0
    for tree in t.train_trees:
        ids = torch.tensor([list(tree.prompt_ids + tree.replies[0])])
        labels = torch.tensor([[-100]*len(tree.prompt_ids) + [i if m else -100 for i, m in zip(tree.replies[0], tree.masks[0])]])
        total = total + F.cross_entropy(model(input_ids=ids).logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum")
        count += int((labels[0, 1:] != -100).sum())
    (total/count).backward()
    return (total/count).item(), {n: p.grad for n, p in t.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("batch_size,accumulate", [(12, 1), (3, 4), (1, 12), (5, 3), (4, 4)])
def test_one_batch_is_k_micro_batches(batch_size, accumulate):
    # item 38
    # item 50
    expected_loss, expected = plain_gradients(12)
    steps, history = gradients(batch_size=batch_size, accumulate=accumulate, max_steps=1)
    assert history[0]["loss"] == pytest.approx(expected_loss, abs=2e-6)
    assert set(steps[0]) == set(expected)
    for name in expected: torch.testing.assert_close(steps[0][name], expected[name], atol=1e-6, rtol=0)


def test_last_step_of_an_epoch_has_fewer_micro_batches():
    # 10 rows in batches of 2, 4 to a step: the second step holds one micro-batch, and is divided by its own tokens
    t = make(10)
    order = [[t.train_trees[i] for i in b] for b in EpochBatches(10, 2, 0)]
    steps, history = gradients(n=10, batch_size=2, accumulate=4, max_steps=2, lr=1e-12)
    assert len(order) == 5
    seen = [h["loss"] for h in history if "loss" in h]
    for loss, group in zip(seen, (order[:4], order[4:])):
        trees = [x for b in group for x in b]
        with torch.no_grad(): logps = [T.reply_logps(t.model.model, T.batch_trees([x], t.model.model))[0].sum().item() for x in trees]
        assert loss == pytest.approx(-sum(logps)/sum(x.n_tokens for x in trees), abs=1e-5)


def test_recomputed_activations_give_the_same_gradients():
    from ftcourse.tune.adapters import checkpoint_activations
    plain, _ = gradients(batch_size=12, max_steps=1)
    keep = Gradients()
    t = make(callbacks=[keep], max_grad_norm=1e9, batch_size=12, max_steps=1)
    checkpoint_activations(t.model.model)
    T.reply_logps(t.model.model, T.batch_trees(t.train_trees, t.model.model))  # the first call asks the model some questions
    calls = []
    t.model.model.model.layers[0].self_attn.register_forward_pre_hook(lambda *a: calls.append(1))
    t.fit()
    assert len(calls) == 2, "the layer should have run twice: once forward, once for the backward pass"
    for n in plain[0]: torch.testing.assert_close(keep.steps[0][n], plain[0][n], atol=1e-7, rtol=0)


def test_metrics_are_sums_over_what_is_counted():
    count = lambda batch: len(batch)
    obj = Objective("rows", lambda logps, mask, batch: (-(logps*mask).sum(), {"row_sum": float(sum(batch.rows))}), count)
    history = make(12, objective=obj, batch_size=4, accumulate=3, max_steps=1, eval_n=5).fit()
    assert history[0]["row_sum"] == pytest.approx(sum(range(12))/12)
    assert next(h for h in history if "eval_row_sum" in h)["eval_row_sum"] == pytest.approx(sum(range(5))/5)


def test_evaluation_does_not_depend_on_the_batch():
    values = [make(4, eval_n=7, batch_size=b, max_steps=1).evaluate() for b in (1, 2, 7)]
    for v in values[1:]: assert v["eval_loss"] == pytest.approx(values[0]["eval_loss"], abs=1e-6)
    t = make(4, eval_n=7, max_steps=1)
    hits = total = 0
    for tree in t.eval_trees:  # by plain logits
        ids = torch.tensor([list(tree.prompt_ids + tree.replies[0])])
        guess = t.model.model(input_ids=ids).logits[0, :-1].argmax(-1).tolist()
        mask = [0]*len(tree.prompt_ids) + list(tree.masks[0])
        hits += sum(g == i for g, i, m in zip(guess, ids[0].tolist()[1:], mask[1:]) if m)
        total += tree.n_tokens
    assert values[0]["eval_token_accuracy"] == pytest.approx(hits/total)


# --- order, rate, settings ----------------------------------------------------------------------------------
def test_epoch_batches():
    b = EpochBatches(10, 4, seed=2)
    first = list(b)
    assert [len(x) for x in first] == [4, 4, 2] and len(b) == 3
    assert sorted(i for x in first for i in x) == list(range(10))
    b.epoch = 1
    assert list(b) != first and sorted(i for x in b for i in x) == list(range(10))
    b.epoch = 0
    assert list(b) == first
    assert list(EpochBatches(10, 4, seed=3)) != first


@pytest.mark.parametrize("n,size,world", [(10, 4, 2), (9, 4, 3), (5, 4, 4), (7, 2, 2)])
def test_processes_share_each_batch(n, size, world):
    whole, parts = list(EpochBatches(n, size)), [list(EpochBatches(n, size, 0, rank, world)) for rank in range(world)]
    for i, batch in enumerate(whole):
        shares = [p[i] for p in parts]
        assert sorted(r for s in shares for r in s if r >= 0) == sorted(batch)
        assert all(s for s in shares), "a process without a batch would leave the others waiting"


def test_rate_by_hand():
    assert [rate(s, 4) for s in range(4)] == [1, .75, .5, .25]
    assert [rate(s, 6, 2) for s in range(6)] == pytest.approx([1/3, 2/3, 1, .75, .5, .25])
    assert rate(2, 4, 0, "cosine") == pytest.approx(.5) and rate(1, 4, 0, "cosine") == pytest.approx(.5 + .5*2**.5/2)
    assert all(rate(s, 9, 3, "constant") == 1 for s in range(3, 9))
    assert all(rate(s, 20, w, k) > 0 for s in range(20) for w in (0, 1, 19) for k in ("linear", "cosine", "constant"))


def test_the_rate_is_the_one_used():
    history = make(8, batch_size=4, max_steps=4, lr=.4, schedule="linear").fit()
    assert [h["learning_rate"] for h in history if "loss" in h] == pytest.approx([.4, .3, .2, .1])


@pytest.mark.parametrize("bad", [dict(lr=0), dict(lr=-1.), dict(lr=float("nan")), dict(lr="1e-3"), dict(batch_size=0), dict(batch_size=2.5), dict(accumulate=0),
    dict(n_epochs=0), dict(max_steps=0), dict(schedule="sudden"), dict(warmup=1.), dict(warmup=-.1), dict(patience=0), dict(keep=0), dict(max_grad_norm=0),
    dict(weight_decay=-1), dict(eval_every=0), dict(lr=True)])
def test_settings_that_cannot_be(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}="): Run(**bad)


def test_what_cannot_be_trained():
    model, tokenizer = load("tiny")
    trees = encode_rows(rows_of(2), tokenizer)
    with pytest.raises(ValueError, match="empty"): TreeTrainer(add_lora(load("tiny")[0]), OBJECTIVE, [])
    with pytest.raises(ValueError, match="requires a gradient"): TreeTrainer(model.requires_grad_(False), OBJECTIVE, trees)
    with pytest.raises(ValueError, match="float32"): TreeTrainer(model.bfloat16().requires_grad_(True), OBJECTIVE, trees)
    with pytest.raises(ValueError, match="patience=2 needs"): TreeTrainer(add_lora(load("tiny")[0]), OBJECTIVE, trees, run=Run(patience=2))


# --- the run folder -----------------------------------------------------------------------------------------
def test_run_folder(tmp_path):
    t = make(8, tmp_path/"run", eval_n=3, batch_size=4, n_epochs=2)
    history = t.fit()
    names = {p.name for p in (tmp_path/"run").iterdir()}
    assert {"config.json", "versions.json", "metrics.jsonl", "curves.png", "checkpoint-4"} <= names and ".partial" not in names
    assert [json.loads(l) for l in (tmp_path/"run"/"metrics.jsonl").read_text().splitlines()] == history
    config = json.loads((tmp_path/"run"/"config.json").read_text())
    assert config["finished"] is True and config["run"]["lr"] == 1e-3 and config["run"]["n_rows"] == 8
    assert json.loads((tmp_path/"run"/"versions.json").read_text())["torch"] == torch.__version__
    assert {p.name for p in (tmp_path/"run"/"checkpoint-4").iterdir()} == {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt",
                                                                          "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    assert len(checkpoints(tmp_path/"run")) == 2  # keep=2


def test_nothing_is_left_without_an_out(tmp_path, monkeypatch):
    monkeypatch.setattr(T.tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    make(6, eval_n=3, batch_size=3, n_epochs=2, patience=2).fit()
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_in_the_order_of_steps(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-100", ".partial/checkpoint-101", "checkpoint-7.tmp", "checkpoint-"): (tmp_path/name).mkdir(parents=True)
    (tmp_path/"checkpoint-11").write_text("a file")
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path/"file").write_text("")
    for out in (tmp_path/"file"/"run", "/proc/run" if sys.platform == "linux" else tmp_path/"file"):
        with pytest.raises(ValueError, match="can't be written to"): make(4, out)


def test_disk_full_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(T.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**5, 10**5))
    with pytest.raises(ValueError, match=r"has 0 MB of room, but this run's checkpoints need"): make(4, tmp_path/"run")
    make(4, max_steps=1).fit()  # without a folder nothing is written


def test_disk_full_while_training(tmp_path, monkeypatch):
    whole = make(8, tmp_path/"whole", batch_size=4, n_epochs=3, save_every=2)
    whole.fit()
    calls, save = [], torch.save
    def full(obj, path, *args, **kwargs):
        calls.append(path)
        if len(calls) > 4:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(obj, path, *args, **kwargs)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="checkpoint of step 4 could not be written.*checkpoint-2"): make(8, tmp_path/"run", batch_size=4, n_epochs=3, save_every=2).fit()
    monkeypatch.setattr(torch, "save", save)
    assert [p.name for p in checkpoints(tmp_path/"run")] == ["checkpoint-2"] and not (tmp_path/"run"/".partial").exists()
    again = make(8, tmp_path/"run", batch_size=4, n_epochs=3, save_every=2)
    again.fit(resume=True)
    assert same(weights(again), weights(whole))


def test_an_unfinished_run_is_not_overwritten(tmp_path):
    stop = StopAt(3)
    with pytest.raises(Interrupted): make(8, tmp_path/"run", batch_size=2, callbacks=[stop]).fit()
    with pytest.raises(ValueError, match="unfinished run .last checkpoint: checkpoint-3..*resume=True"): make(8, tmp_path/"run", batch_size=2).fit()
    with pytest.raises(ValueError, match="other settings .lr: 0.001 then, 0.002 now"): make(8, tmp_path/"run", batch_size=2, lr=2e-3).fit(resume=True)
    with pytest.raises(ValueError, match="data_sha256"): make(9, tmp_path/"run", batch_size=2).fit(resume=True)
    make(8, tmp_path/"run", batch_size=2).fit(overwrite=True)
    make(8, tmp_path/"run", batch_size=4).fit()  # a finished one may be


# --- stops ---------------------------------------------------------------------------------------------------
class StopAt(TrainerCallback):
    "Presses Ctrl-C in the middle of step n."
    def __init__(self, n, number=signal.SIGINT): self.n, self.number = n, number
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.n - 1: os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_resumes_bit_for_bit(tmp_path, number, capsys):
    settings = dict(batch_size=2, accumulate=2, n_epochs=3, dropout=.3, eval_n=3, lr=1e-2, schedule="cosine", warmup=.2)
    before = signal.getsignal(number) # a background job's children ignore SIGINT
    whole = make(10, tmp_path/"whole", **settings)
    history = whole.fit()
    cut = make(10, tmp_path/"cut", callbacks=[StopAt(5, number)], **settings)
    with pytest.raises(Interrupted, match="Stopped after step 5 of 9.*resume=True"): cut.fit()
    assert "Stopping after this step" in capsys.readouterr().err
    assert checkpoints(tmp_path/"cut")[-1].name == "checkpoint-5"
    torch.manual_seed(123)
    again = make(10, tmp_path/"cut", **settings)
    resumed = again.fit(resume=True)
    assert not same(weights(cut), weights(whole)) and same(weights(again), weights(whole))
    timeless = lambda h: [{k: v for k, v in x.items() if k not in ("tokens_per_s", "eval_seconds")} for x in h if "train_loss" not in x]
    assert timeless(resumed) == timeless(history)
    assert signal.getsignal(number) is before


def test_ctrl_c_without_an_out(tmp_path):
    t = make(8, batch_size=2, callbacks=[StopAt(2)], patience=3, eval_n=2, eval_every=1)
    with pytest.raises(Interrupted) as e: t.fit()
    folder = Path(re.search(r"'(.*?)'", str(e.value))[1])
    assert checkpoints(folder)[-1].name == "checkpoint-2"
    shutil.rmtree(folder)


def test_resume_without_a_checkpoint_starts_at_the_beginning(tmp_path):
    a, b = make(6, tmp_path/"a", max_steps=2), make(6, tmp_path/"b", max_steps=2)
    a.fit(); b.fit(resume=True)
    assert same(weights(a), weights(b))


def test_resume_of_a_finished_run_changes_nothing(tmp_path):
    a = make(6, tmp_path/"a", max_steps=3); a.fit()
    b = make(6, tmp_path/"a", max_steps=3); history = b.fit(resume=True)
    assert same(weights(a), weights(b)) and sum("loss" in h for h in history) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops(tmp_path, value):
    def total(logps, mask, batch):
        return -(logps*mask).sum()*(value if 5 in batch.rows and calls.append(1) is None and len(calls) > 1 else 1.), {}
    calls = []  # row 5 is well in the first epoch, bad in the second
    t = make(8, tmp_path/"run", objective=Objective("bad", total, OBJECTIVE.count), batch_size=2, accumulate=2, n_epochs=3, save_every=1, lr=1e-2)
    with pytest.raises(FloatingPointError, match="the loss became (nan|inf) in step [34].*lower lr") as e: t.fit()
    named = [int(x) for x in re.search(r"rows: ([\d, ]+)", str(e.value))[1].split(",")]
    step = int(re.search(r"in step (\d)", str(e.value))[1])
    b = EpochBatches(8, 2); b.epoch = 1
    assert sorted(named) == sorted(i for x in list(b)[(step - 3)*2:(step - 2)*2] for i in x) and 5 in named
    assert checkpoints(tmp_path/"run")[-1].name == f"checkpoint-{step-1}" and f"checkpoint-{step-1}" in str(e.value)
    assert all(p.isfinite().all() for p in lora_parameters(t.model.model))
    saved = make(8); T.load_trained(saved.model.model, checkpoints(tmp_path/"run")[-1])
    assert same(weights(saved), weights(t)), "the weights are those before the bad step"


def test_a_gradient_that_is_no_number_stops(tmp_path):
    def total(logps, mask, batch):
        loss = -(logps*mask).sum()
        return loss + (logps.sum()*0).abs().sqrt(), {}  # adds 0, but the slope of sqrt at 0 is infinite
    t = make(4, objective=Objective("bad", total, OBJECTIVE.count), batch_size=2)
    before = weights(t)
    with pytest.raises(FloatingPointError, match="the gradient became nan in step 1.*No checkpoint"): t.fit()
    assert same(before, weights(t))


def test_early_stopping_goes_back_to_the_best(tmp_path):
    # what is learnt is the opposite of what is asked: the validation loss must rise
    model, tokenizer = load("tiny")
    row = lambda q, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
    train, val = encode_rows([row("x", "aaaa")]*8, tokenizer), encode_rows([row("x", "zzzz")]*2, tokenizer)
    t = TreeTrainer(add_lora(model), OBJECTIVE, train, val, tmp_path/"run", Run(lr=.02, n_epochs=40, batch_size=8, patience=2, eval_every=1, **QUIET))
    history = t.fit()
    losses = [h["eval_loss"] for h in history if "eval_loss" in h]
    best = losses.index(min(losses))
    assert len(losses) == best + 3 < 40, "two evaluations after the best"
    assert t.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-6)
    assert (tmp_path/"run"/f"checkpoint-{best+1}").exists(), "the best checkpoint is kept"


def test_resumed_early_stopping_stops_at_the_same_step(tmp_path):
    def run(out, callbacks=None, resume=False):
        model, tokenizer = load("tiny")
        row = lambda q, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        train, val = encode_rows([row("x", "aaaa")]*8, tokenizer), encode_rows([row("x", "zzzz")]*2, tokenizer)
        t = TreeTrainer(add_lora(model), OBJECTIVE, train, val, out, Run(lr=.02, n_epochs=40, batch_size=8, patience=3, eval_every=1, **QUIET), callbacks=callbacks)
        return t, t.fit(resume=resume)
    whole, history = run(tmp_path/"whole")
    n = sum("eval_loss" in h for h in history)
    with pytest.raises(Interrupted): run(tmp_path/"cut", [StopAt(n - 1)])
    again, resumed = run(tmp_path/"cut", resume=True)
    assert sum("eval_loss" in h for h in resumed) == n and same(weights(again), weights(whole))


def test_no_chatter(capfd):
    make(6, eval_n=2, max_steps=2, progress=True).fit()
    out, err = capfd.readouterr()
    assert out == "" and err == ""


# --- kills and processes ---------------------------------------------------------------------------------------
CHILD = textwrap.dedent("""
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    import torch
    import test_trainer as t
    out, slow, die_at = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    if die_at:  # in the middle of writing the optimiser of this checkpoint
        save, calls = torch.save, []
        def half(obj, path, *args, **kwargs):
            if str(path).endswith("optimizer.pt"): calls.append(path)
            if len(calls) == die_at:
                save(obj, path, *args, **kwargs)
                data = open(path, "rb").read()
                open(path, "wb").write(data[:len(data)//2])
                os.kill(os.getpid(), signal.SIGKILL)
            return save(obj, path, *args, **kwargs)
        torch.save = half
    class Slow(t.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            import time; time.sleep(slow)
            print("step", args[1].global_step, flush=True)
    trainer = t.make(10, out, dropout=.3, eval_n=3, batch_size=2, accumulate=2, n_epochs=6, lr=1e-2, save_every=2, callbacks=[Slow()])
    trainer.fit(resume=True)
    print("done", flush=True)
""")


def child(tmp_path, out, slow=0.0, die_at=0):
    code = tmp_path/"child.py"
    code.write_text(CHILD.format(tests=str(ROOT/"tests")))
    env = dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT/'tests'}")
    return subprocess.Popen([sys.executable, str(code), str(out), str(slow), str(die_at)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def final(out): return (checkpoints(out)[-1].name, (checkpoints(out)[-1]/"adapter_model.safetensors").read_bytes())


@pytest.mark.slow
def test_sigkill_at_random_steps(tmp_path):
    whole = child(tmp_path, tmp_path/"whole")
    _, err = whole.communicate(timeout=300)
    assert whole.returncode == 0, err
    rng, kills = random.Random(0), 0
    for _ in range(12):
        p = child(tmp_path, tmp_path/"cut", slow=.05)
        stop = rng.randint(3, 6)
        for line in p.stdout:
            stop -= 1
            if line.startswith("done"): break
            if stop == 0:
                time.sleep(rng.random()*.08)
                p.kill(); kills += 1
                break
        p.wait(timeout=60); p.stdout.close(); p.stderr.close()
        if p.returncode == 0: break
    assert p.returncode == 0 and kills >= 2, "it should have been killed more than once and then finished"
    assert final(tmp_path/"cut") == final(tmp_path/"whole")


@pytest.mark.slow
def test_sigkill_while_a_checkpoint_is_written(tmp_path):
    whole = child(tmp_path, tmp_path/"whole")
    _, err = whole.communicate(timeout=300)
    assert whole.returncode == 0, err
    p = child(tmp_path, tmp_path/"cut", die_at=3)
    p.communicate(timeout=300)
    assert p.returncode == -signal.SIGKILL
    assert (tmp_path/"cut"/".partial"/"checkpoint-6").exists() and [c.name for c in checkpoints(tmp_path/"cut")] == ["checkpoint-2", "checkpoint-4"]
    p = child(tmp_path, tmp_path/"cut")
    _, err = p.communicate(timeout=300)
    assert p.returncode == 0, err
    assert final(tmp_path/"cut") == final(tmp_path/"whole")


TWO = textwrap.dedent("""
    import sys
    sys.path.insert(0, {tests!r})
    import torch
    import test_trainer as t
    keep = t.Gradients()
    trainer = t.make(9, sys.argv[1], eval_n=5, batch_size=4, accumulate=2, n_epochs=2, max_grad_norm=1e9, lr=1e-3, save_every=1, callbacks=[keep])
    history = trainer.fit()
    if trainer.args.process_index == 0: torch.save((keep.steps, history, t.weights(trainer)), sys.argv[2])
""")


@pytest.mark.slow
def test_two_processes_give_one_process_s_gradients(tmp_path):
    # 9 rows in batches of 4, two to a step: the last batch holds one row, so that one process has nothing to do
    keep = Gradients()
    one = make(9, tmp_path/"one", eval_n=5, batch_size=4, accumulate=2, n_epochs=2, max_grad_norm=1e9, lr=1e-3, callbacks=[keep])
    history = one.fit()
    (tmp_path/"two.py").write_text(TWO.format(tests=str(ROOT/"tests")))
    env = dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT/'tests'}")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29611", str(tmp_path/"two.py"), str(tmp_path/"two"),
                           str(tmp_path/"result.pt")], env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    steps, history2, weights2 = torch.load(tmp_path/"result.pt")
    assert len(steps) == len(keep.steps) == 4
    for a, b in zip(keep.steps, steps):
        b = {n.removeprefix("module."): g for n, g in b.items()}
        assert set(a) == set(b)
        for n in a: torch.testing.assert_close(a[n], b[n], atol=1e-5, rtol=0)
    for key in ("loss", "eval_loss", "eval_token_accuracy"):
        assert [h[key] for h in history if key in h] == pytest.approx([h[key] for h in history2 if key in h], abs=1e-5)
    for k, w in weights(one).items(): torch.testing.assert_close(w, weights2[k], atol=1e-5, rtol=0)
