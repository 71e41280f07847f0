"""Plausible wrong answers to the exercises of 4_align/reward."""
import math

def _pairs(scores, ranks, better): return [math.log(1 + math.exp(b - a)) for a, i in zip(scores, ranks) for b, j in zip(scores, ranks) if better(i, j)]
def _highest_is_best(scores, ranks):
    losses = _pairs(scores, ranks, lambda i, j: 0 < j < i)
    return sum(losses)/len(losses)
def _ties_count(scores, ranks):
    losses = _pairs([s for s, r in zip(scores, ranks) if r], [r for r in ranks if r], lambda i, j: i <= j)
    return sum(losses)/len(losses)
def _all_pairs_divide(scores, ranks): return sum(_pairs(scores, ranks, lambda i, j: 0 < i < j))/(len(scores)*(len(scores) - 1)/2)
def _absent_is_best(scores, ranks):
    losses = _pairs(scores, ranks, lambda i, j: i < j)
    return sum(losses)/len(losses)
def _sum(scores, ranks): return sum(_pairs(scores, ranks, lambda i, j: 0 < i < j))

def _std(scores, less=0):
    mean = sum(scores)/len(scores)
    return mean, math.sqrt(sum((s - mean)**2 for s in scores)/(len(scores) - less))
def _unscaled_bias(scores):
    mean, std = _std(scores)
    return 1/std, -mean
def _sample_std(scores):
    mean, std = _std(scores, 1)
    return 1/std, -mean/std
def _gain_is_std(scores):
    mean, std = _std(scores)
    return std, -mean*std
def _sign(scores):
    mean, std = _std(scores)
    return 1/std, mean/std

WRONG = {"reward.1": [_highest_is_best, _ties_count, _all_pairs_divide, _absent_is_best, _sum], "reward.2": [_unscaled_bias, _sample_std, _gain_is_std, _sign], "reward.3": [3, 5, 4, 1]}
