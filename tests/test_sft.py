"""Supervised fine-tuning: the loss against other ways to compute it, what is taught, what is refused, what comes back from disk."""
import json, math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ftcourse.data.batches import encode_rows
from ftcourse.models import load
from ftcourse.tune.sft import SFT, constant_system, finetune, sft_loss, sft_rows
from ftcourse.tune.trainer import EpochBatches, _Collate, checkpoints

SYSTEM = "Say one animal."
ROWS = [{"messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"number {i}"}, {"role": "assistant", "content": ("cat", "dog and dog", "a long grey elephant")[i % 3]}]}
        for i in range(12)]
TWO_TURNS = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello you"}, {"role": "user", "content": "bye"}, {"role": "assistant", "content": "see you"}]}
QUICK = dict(progress=False, max_steps=2)


# --- the loss ----------------------------------------------------------------------------------------------------
def test_loss_is_cross_entropy_over_counted_tokens():
    # item 50
    gen = torch.Generator().manual_seed(0)
    for R, L, V in ((1, 1, 2), (3, 5, 7), (4, 9, 11)):
        logits, ids = torch.randn(R, L, V, generator=gen), torch.randint(V, (R, L), generator=gen)
        mask = (torch.rand(R, L, generator=gen) < .6).long()
        mask[0, 0] = 1
        logps = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        labels = torch.where(mask.bool(), ids, torch.full_like(ids, -100))
        torch.testing.assert_close(sft_loss(logps*mask, mask), F.cross_entropy(logits.reshape(-1, V), labels.reshape(-1), ignore_index=-100))
        junk = torch.where(mask.bool(), logps, torch.full_like(logps, -1e4))
        torch.testing.assert_close(sft_loss(junk, mask), sft_loss(logps*mask, mask))


def test_loss_by_counting_sequences():
    # V = 3, T = 2: the probabilities of all nine replies sum to 1, and exp(-2 loss) is that of the reply given
    logits = torch.tensor([[.3, -1., 2.], [1., 0., -.5]], dtype=torch.float64)
    p = logits.softmax(-1)
    total = 0.
    for a in range(3):
        for b in range(3):
            logps = torch.stack([p[0, a].log(), p[1, b].log()])[None]
            total += math.exp(-2*sft_loss(logps, torch.ones(1, 2)).item())
    assert total == pytest.approx(1, abs=1e-12)


def test_loss_of_long_and_short_replies_weighs_tokens_not_replies():
    # item 50
    logps = torch.tensor([[-1., -1., -1., -1.], [-5., 0., 0., 0.]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    assert sft_loss(logps, mask).item() == pytest.approx(9/5)      # not (1 + 5)/2
    assert sft_loss(logps[:1], mask[:1], 5).item() + sft_loss(logps[1:], mask[1:], 5).item() == pytest.approx(9/5)
    with pytest.raises(ValueError, match="no token counts"): sft_loss(logps, mask*0)


def test_a_step_of_finetune_has_the_models_own_cross_entropy():
    # item 50
    model, tokenizer = load("tiny")
    total = count = 0
    for t in encode_rows(ROWS, tokenizer):
        ids = torch.tensor([t.prompt_ids + t.replies[0]])
        labels = torch.tensor([-100]*len(t.prompt_ids) + list(t.replies[0]))
        total += F.cross_entropy(model(input_ids=ids).logits[0, :-1], labels[1:], ignore_index=-100, reduction="sum").item()
        count += len(t.replies[0])
    for batch_size, accumulate in ((12, 1), (5, 3)):
        bot = finetune("tiny", ROWS, batch_size=batch_size, accumulate=accumulate, max_steps=1, progress=False)
        assert bot.history[0]["loss"] == pytest.approx(total/count, abs=1e-5)


# --- what is taught ------------------------------------------------------------------------------------------------
def taught(rows, tokenizer_model=None):
    "What the training batches of `rows` teach, decoded: one text a row."
    model, tokenizer = tokenizer_model or load("tiny")
    trees = encode_rows(sft_rows(rows), tokenizer)
    texts = {}
    for batch in EpochBatches(len(trees), 3):
        b = _Collate(trees, model, 0, SFT)(batch).batch
        R, L = b.reply_mask.shape
        for r, row in enumerate(b.rows): texts[row] = [b.targets[i].item() for i in range(len(b.targets)) if b.slots[i] // L == r]
        flat = b.input_ids.flatten()
        assert torch.equal(flat[b.sources + 1], b.targets), "the target is the token that follows the source"
    return [tokenizer.decode(texts[i]) for i in range(len(trees))], tokenizer


def test_exactly_the_replies_and_their_end_tokens_are_taught():
    # item 45
    # item 46
    texts, tokenizer = taught([*ROWS, TWO_TURNS])
    end = tokenizer.eos_token
    assert texts[:12] == [r["messages"][-1]["content"] + end for r in ROWS]
    assert texts[12] == f"hello you{end}see you{end}"


@pytest.mark.slow
@pytest.mark.real
def test_exactly_the_replies_are_taught_with_smollm2():
    # item 45
    # item 46
    pair = load("smollm2-135m")
    texts, tokenizer = taught([*ROWS, TWO_TURNS], pair)
    assert texts[0] == "cat<|im_end|>" and texts[12] == "hello you<|im_end|>see you<|im_end|>"


def test_a_row_with_nothing_to_learn_is_named():
    # item 48
    for reply in ("", "  "):
        bad = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": reply}]}
        with pytest.raises(ValueError, match="row 2"): finetune("tiny", [*ROWS[:2], bad], **QUICK)
    with pytest.raises(ValueError, match="row 1.*no reply"): finetune("tiny", [ROWS[0], {"messages": [{"role": "user", "content": "hi"}]}], **QUICK)


# --- finetune and the bot -------------------------------------------------------------------------------------------
def test_it_learns():
    bot = finetune("tiny", ROWS[:3], n_epochs=120, lr=3e-3, method="full", progress=False)
    assert bot.history[0]["loss"] > 5 and [h["loss"] for h in bot.history if "loss" in h][-1] < .05
    assert bot.answers(["number 0", "number 1", "number 2"]) == ["cat", "dog and dog", "a long grey elephant"]
    assert bot.system == SYSTEM and bot.chat("number 1") == "dog and dog"
    assert bot.chat([{"role": "system", "content": SYSTEM}, {"role": "user", "content": "number 2"}]) == "a long grey elephant"


def test_same_seed_same_bot():
    a, b, c = (finetune("tiny", ROWS, seed=s, dropout=.1, **QUICK) for s in (0, 0, 1))
    state = lambda bot: {n: p for n, p in bot.model.named_parameters() if p.requires_grad}
    assert all(torch.equal(p, state(b)[n]) for n, p in state(a).items())
    assert not all(torch.equal(p, state(c)[n]) for n, p in state(a).items())


def logits(model): return model(input_ids=torch.arange(1, 40)[None]).logits


def test_saved_adapter_in_plain_peft_and_in_load(tmp_path):
    from peft import PeftModel
    bot = finetune("tiny", ROWS, lr=1e-2, progress=False)
    assert bot.save(tmp_path/"bot") == tmp_path/"bot"
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "ftcourse.json"} <= {p.name for p in (tmp_path/"bot").iterdir()}
    base = load("tiny")[0]
    before = logits(base)
    peft = PeftModel.from_pretrained(base, str(tmp_path/"bot"))
    assert (logits(bot.model) - before).abs().max() > .1
    torch.testing.assert_close(logits(peft), logits(bot.model), atol=1e-6, rtol=0)
    model, tokenizer = load(tmp_path/"bot")
    torch.testing.assert_close(logits(model), logits(bot.model), atol=1e-6, rtol=0)
    assert tokenizer.chat_template == bot.tokenizer.chat_template
    assert json.loads((tmp_path/"bot"/"ftcourse.json").read_text())["system"] == SYSTEM


def test_run_folder_opens_too(tmp_path):
    bot = finetune("tiny", ROWS, tmp_path/"run", **QUICK)
    assert bot.out == tmp_path/"run"
    torch.testing.assert_close(logits(load(tmp_path/"run")[0]), logits(bot.model), atol=1e-6, rtol=0)
    assert json.loads((tmp_path/"run"/"config.json").read_text())["model"] == "tiny"


def test_full_training(tmp_path):
    bot = finetune("tiny", ROWS, tmp_path/"run", method="full", lr=1e-3, **QUICK)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in bot.model.parameters())
    model, _ = load(tmp_path/"run"/"model", dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(bot.model), atol=1e-6, rtol=0)
    again = finetune("tiny", ROWS, tmp_path/"run", method="full", lr=1e-3, resume=True, **QUICK)
    torch.testing.assert_close(logits(again.model), logits(bot.model), atol=0, rtol=0)
    assert (checkpoints(tmp_path/"run")[-1]/"trained.safetensors").exists()


def test_validation_and_early_stopping():
    bot = finetune("tiny", ROWS, eval_data=ROWS[:4], n_epochs=2, patience=5, batch_size=4, progress=False)
    evals = [h for h in bot.history if "eval_loss" in h]
    assert len(evals) >= 4 and all(0 <= h["eval_token_accuracy"] <= 1 for h in evals)


@pytest.mark.parametrize("form", ["jsonl", "json", "dataset", "alpaca", "sharegpt", "text", "prompt_messages"])
def test_data_people_have(form, tmp_path):
    if form == "jsonl": data = tmp_path/"d.jsonl"; data.write_text("\n".join(map(json.dumps, ROWS)))
    if form == "json": data = str(tmp_path/"d.json"); Path(data).write_text(json.dumps(ROWS))
    if form == "dataset":
        from datasets import Dataset
        data = Dataset.from_list(ROWS)
    if form == "alpaca": data = [{"instruction": "Name it", "input": "big and grey", "output": "elephant"}]*3
    if form == "sharegpt": data = [{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}]*3
    if form == "text": data = [{"prompt": "one two", "completion": " three"}]*3
    if form == "prompt_messages": data = [{"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "hello"}]}]*3
    bot = finetune("tiny", data, **QUICK)
    assert isinstance(bot.chat("hi", max_new_tokens=3), str)
    assert bot.system == (SYSTEM if form in ("jsonl", "json", "dataset") else None)


def test_constant_system():
    assert constant_system(ROWS) == SYSTEM
    assert constant_system([*ROWS, TWO_TURNS]) is None and constant_system([TWO_TURNS]) is None
    assert constant_system([{"prompt": "a", "completion": "b"}]) is None


@pytest.mark.parametrize("data,match", [
    ([], "no rows"), ([{"question": "a", "answer": "b"}], "row 0.*question"), ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "row 0.*preference"),
    ("no-such-set", "no-such-set"), ("missing.jsonl", "missing.jsonl"), ([ROWS[0], {"prompt": "a"}], "row 1")])
def test_data_that_cannot_be_used(data, match):
    with pytest.raises(ValueError, match=match): finetune("tiny", data, **QUICK)


@pytest.mark.parametrize("bad,match", [(dict(lr=0), "lr=0"), (dict(lr=-1e-3), "lr=-0.001"), (dict(batch_size=0), "batch_size=0"), (dict(method="best"), "'lora', 'qlora' and 'full'"),
    (dict(r=0), "r=0"), (dict(dropout=1.), "dropout"), (dict(targets=["nothing"]), "matches no linear layer"), (dict(patience=2), "patience=2 needs"),
    (dict(n_epochs=-1), "n_epochs=-1"), (dict(max_len=10), "12 of 12 rows.*|12 of 12 rows"), (dict(schedule="x"), "schedule='x'"), (dict(max_len=0), "max_len=0")])
def test_options_that_cannot_be(bad, match):
    with pytest.raises(ValueError, match=match): finetune("tiny", ROWS, **{**QUICK, **bad})


def test_report_to_reaches_the_trainer(tmp_path):
    pytest.importorskip("tensorboard")
    finetune("tiny", ROWS, tmp_path/"run", report_to="tensorboard", **QUICK)
    assert list((tmp_path/"run").rglob("events.out.tfevents*"))


# --- TRL ---------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_trl_s_loss(tmp_path):
    # the same rows, batch and model: TRL's first logged loss and ours
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    model, tokenizer = load("tiny")
    rows = [{"prompt": f"number {i}:", "completion": " " + r["messages"][-1]["content"]} for i, r in enumerate(ROWS)]
    args = trl.SFTConfig(output_dir=str(tmp_path/"trl"), max_steps=1, per_device_train_batch_size=12, learning_rate=1e-12, logging_steps=1, report_to="none", use_cpu=True,
                         bf16=False, gradient_checkpointing=False, completion_only_loss=True, save_strategy="no", disable_tqdm=True)
    t = trl.SFTTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    t.train()
    theirs = t.state.log_history[0]["loss"]
    ours = finetune("tiny", rows, batch_size=12, max_steps=1, lr=1e-12, progress=False).history[0]["loss"]
    assert ours == pytest.approx(theirs, abs=1e-3)
