"""Plausible wrong answers to the chapter on the trainer."""
import math


def _mean_of_means(micro_batches): return sum(sum(m)/len(m) for m in micro_batches if m)/len(micro_batches)
def _sum_only(micro_batches): return sum(map(sum, micro_batches))
def _by_micro_batches(micro_batches): return sum(map(sum, micro_batches))/len(micro_batches)

def _by_letter(names): return max((n for n in names if n.startswith("checkpoint-")), default=None)
def _last_in_list(names): return next((n for n in reversed(names) if n.startswith("checkpoint-")), None)
def _torn_too(names):
    steps = {int("".join(c for c in n if c.isdigit())): n for n in names if n.startswith("checkpoint-")}
    return steps[max(steps)] if steps else None

def _any_rise(losses, patience):
    for i in range(1, len(losses)):
        if losses[i] > losses[i-1]: return i + 1
def _equal_is_better(losses, patience):
    best, since = math.inf, 0
    for i, loss in enumerate(losses, 1):
        best, since = (loss, 0) if loss <= best else (best, since + 1)
        if since >= patience: return i
def _one_late(losses, patience):
    best, since = math.inf, 0
    for i, loss in enumerate(losses, 1):
        best, since = (loss, 0) if loss < best else (best, since + 1)
        if since > patience: return i

WRONG = {"trainer.1": [_mean_of_means, _sum_only, _by_micro_batches], "trainer.2": [_by_letter, _last_in_list, _torn_too],
         "trainer.3": [_any_rise, _equal_is_better, _one_late]}
