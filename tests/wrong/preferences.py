"""Plausible wrong answers to the exercises of 4_align/preferences."""
import math
from itertools import combinations


def _ties_agree(a, b):
    pairs = list(combinations(range(len(a)), 2))
    return sum((a[i] < a[j]) == (b[i] < b[j]) for i, j in pairs)/len(pairs)
def _of_all_decided_by_a(a, b):
    pairs = [(i, j) for i in range(len(a)) for j in range(len(a)) if a[i] < a[j]]
    return sum(b[i] < b[j] for i, j in pairs)/len(pairs) if pairs else None
def _same_ranks(a, b): return sum(x == y for x, y in zip(a, b))/len(a)
def _zero_for_none(a, b):
    pairs = [(i, j) for i in range(len(a)) for j in range(len(a)) if a[i] < a[j] and b[i] != b[j]]
    return sum(b[i] < b[j] for i, j in pairs)/len(pairs) if pairs else 0.0

def _share_of_votes(votes, accuracies):
    said = [v for v in votes if v is not None]
    return sum(v == 1 for v in said)/len(said) if said else .5
def _weighted_share(votes, accuracies):
    said = [(v, p) for v, p in zip(votes, accuracies) if v is not None]
    return sum(p for v, p in said if v == 1)/sum(p for _, p in said) if said else .5
def _likelihood_only(votes, accuracies): return math.prod(p if v == 1 else 1 - p for v, p in zip(votes, accuracies) if v is not None)
def _missing_is_against(votes, accuracies):
    first = math.prod(p if v == 1 else 1 - p for v, p in zip(votes, accuracies))
    second = math.prod(1 - p if v == 1 else p for v, p in zip(votes, accuracies))
    return first/(first + second)

WRONG = {"preferences.1": [_ties_agree, _of_all_decided_by_a, _same_ranks, _zero_for_none],
         "preferences.2": [_share_of_votes, _weighted_share, _likelihood_only, _missing_is_against], "preferences.3": [0.8, 0.512, 0.384, 0.992]}
