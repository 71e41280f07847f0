"""The training loop and its measures: by hand, against other libraries, and at the edges."""
import math, random

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from ftcourse.models import load
from ftcourse.tune.loop import best_step, early_stop, evaluate, shift_labels, token_accuracy, train_steps


class One(nn.Module):
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.tensor(1.0))


def square(model, batch): return model.w**2 / 2


def test_three_steps_by_hand():
    one = One()
    assert_close(train_steps(one, range(3), torch.optim.SGD(one.parameters(), 0.1), square), [0.5, 0.405, 0.32805])  # w = 1, 0.9, 0.81
    assert_close(one.w.item(), 0.729)
    assert one.w.grad is None or one.w.grad == 0


def test_old_gradients_do_not_count():
    one = One()
    one.w.grad = torch.tensor(100.0)
    train_steps(one, range(1), torch.optim.SGD(one.parameters(), 0.1), square)
    assert_close(one.w.item(), 0.9)


def test_the_schedule_moves_after_the_step():
    one = One()
    opt = torch.optim.SGD(one.parameters(), 0.5)
    train_steps(one, range(2), opt, square, torch.optim.lr_scheduler.LambdaLR(opt, lambda t: [1.0, 0.5, 0.0][t]))
    assert_close(one.w.item(), 0.5 * 0.75)  # rates 0.5, then 0.25
    assert opt.param_groups[0]["lr"] == 0


def test_stops_at_nan_before_the_step():
    one = One()
    with pytest.raises(ValueError, match="step 2"):
        train_steps(one, [1.0, 1.0, math.nan, 1.0], torch.optim.SGD(one.parameters(), 0.1), lambda m, b: m.w**2 / 2 * b)
    assert_close(one.w.item(), 0.81)


def test_same_as_the_trainer():
    "transformers' Trainer, same rows in the same order, SGD without a schedule: the same weights."
    from transformers import Trainer, TrainingArguments
    rows = [{"input_ids": torch.arange(5 * i, 5 * i + 12), "labels": torch.arange(5 * i, 5 * i + 12)} for i in range(4)]
    ours, theirs = load("tiny")[0], load("tiny")[0]
    losses = train_steps(ours, [{k: v[None] for k, v in r.items()} for r in rows], torch.optim.SGD(ours.parameters(), 0.1), lambda m, b: m(**b).loss)
    class InOrder(Trainer):
        def _get_train_sampler(self, *args, **kwargs): return torch.utils.data.SequentialSampler(self.train_dataset)
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, per_device_train_batch_size=1, learning_rate=0.1, lr_scheduler_type="constant", optim="sgd", num_train_epochs=1, max_grad_norm=0,
                                 report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False)
        InOrder(theirs, args, train_dataset=rows).train()
    assert len(losses) == 4
    for p, q in zip(ours.parameters(), theirs.parameters()): assert_close(p, q, rtol=1e-4, atol=1e-6)


# --- accuracy -----------------------------------------------------------------------------------------------
def says(*rows): return F.one_hot(torch.tensor(rows), 12).float()


@pytest.mark.parametrize("choices, labels, expected", [
    ([6, 7, 8, 9], [5, 6, 7, 8], 1.0), ([5, 6, 7, 8], [5, 6, 7, 8], 0.0), ([6, 9, 0, 9], [5, 6, -100, 8], 0.5), ([6, 7, 0, 0], [5, 6, 7, 8], 2 / 3),
    ([1, 2, 3], [-100, -100, 2], 1.0), ([1, 2, 3], [7, -100, 3], 0.0)])
def test_accuracy_by_hand(choices, labels, expected):
    assert token_accuracy(says(choices), torch.tensor([labels])) == pytest.approx(expected)


def test_accuracy_by_counting():
    rng = random.Random(0)
    for _ in range(50):
        B, T = rng.randint(1, 3), rng.randint(2, 6)
        labels = torch.tensor([[rng.choice([-100, 1, 2]) for _ in range(T)] for _ in range(B)])
        logits = torch.randn(B, T, 4)
        right = [logits[b, t].argmax().item() == labels[b, t + 1].item() for b in range(B) for t in range(T - 1) if labels[b, t + 1] != -100]
        got = token_accuracy(logits, labels)
        assert got == pytest.approx(sum(right) / len(right)) if right else math.isnan(got)
        wide = torch.cat([logits, torch.randn(B, 3, 4)], 1), F.pad(labels, (0, 3), value=-100)  # padding changes nothing
        assert token_accuracy(*wide) == pytest.approx(got, nan_ok=True)


def test_accuracy_refuses_shifted_labels():
    with pytest.raises(ValueError, match="shift"): token_accuracy(torch.zeros(1, 4, 3), torch.zeros(1, 3, dtype=torch.long))


def test_the_shift_is_transformers():
    from transformers.loss.loss_utils import ForCausalLMLoss
    logits, labels = torch.randn(2, 5, 7), torch.tensor([[1, 2, -100, 3, 4], [-100, -100, 6, 0, -100]])
    mine = F.cross_entropy(logits.flatten(0, 1), shift_labels(labels).flatten())
    assert_close(mine, ForCausalLMLoss(logits, labels, vocab_size=7))
    assert shift_labels(torch.tensor([[4]])).tolist() == [[-100]]


def test_evaluate_weighs_tokens():
    model = load("tiny")[0]
    short, long = torch.tensor([[1, 2]]), torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10, 11]])  # 1 and 8 predictions
    batches = [{"input_ids": x, "labels": x} for x in (short, long)]
    a, b = (model(**x).loss.item() for x in batches)
    model.train()
    loss, accuracy = evaluate(model, batches)
    assert_close(loss, (a + 8 * b) / 9, rtol=1e-5, atol=0) and model.training
    right = sum((model(x["input_ids"]).logits.argmax(-1)[:, :-1] == x["input_ids"][:, 1:]).sum().item() for x in batches)
    assert accuracy == pytest.approx(right / 9)
    assert all(p.grad is None for p in model.parameters())
    empty = {"input_ids": short, "labels": torch.full((1, 2), -100)}
    assert evaluate(model, [*batches, empty]) == (loss, accuracy)
    with pytest.raises(ValueError, match="no token"): evaluate(model, [empty])


# --- stopping -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("losses, best", [([5, 3, 4], 1), ([1], 0), ([2, 1, 1], 1), ([math.nan, 7, 8], 1), ([3, math.nan, 2], 2), ([math.inf, math.nan, 4], 2)])
def test_best_step(losses, best): assert best_step(losses) == best


def test_best_step_of_nothing():
    with pytest.raises(ValueError, match="no validation"): best_step([])
    with pytest.raises(ValueError, match="patience=0"): early_stop([1.0], 0)


def test_early_stop_is_transformers():
    "The first evaluation at which to stop is EarlyStoppingCallback's."
    from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments
    import tempfile
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, metric_for_best_model="eval_loss", greater_is_better=False, load_best_model_at_end=False, eval_strategy="steps", eval_steps=1, use_cpu=True)
        for _ in range(40):
            losses, patience = [rng.randint(0, 9) / 3 for _ in range(12)], rng.randint(1, 4)
            callback, state, theirs = EarlyStoppingCallback(patience), TrainerState(), None
            for i, loss in enumerate(losses):
                control = TrainerControl()
                callback.on_evaluate(args, state, control, {"eval_loss": loss})
                if state.best_metric is None or loss < state.best_metric: state.best_metric = loss
                if control.should_training_stop: theirs = i; break
            ours = next((i for i in range(len(losses)) if early_stop(losses[:i + 1], patience)), None)
            assert ours == theirs, (losses, patience)
