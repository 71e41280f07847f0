"""Plausible wrong answers to the exercises of 5_evals/code."""
import math
from collections import Counter

def _share(p, q): return math.ceil(q/p)
def _one_too_many(p, q): return math.floor(math.log(1 - q)/math.log(1 - p)) + 1 if p < 1 else 1
def _above(p, q):
    k = 1
    while 1 - (1 - p)**k <= q and p < 1: k += 1
    return k

def _first_input(outputs):
    counts = Counter(o[0] for o in outputs)
    return max(range(len(outputs)), key=lambda i: counts[outputs[i][0]])
def _last(outputs):
    counts = Counter(map(tuple, outputs))
    return max(reversed(range(len(outputs))), key=lambda i: counts[tuple(outputs[i])])
def _each_input(outputs):
    columns = [Counter(c) for c in zip(*outputs)]
    return max(range(len(outputs)), key=lambda i: sum(c[x] for c, x in zip(columns, outputs[i])))

WRONG = {"code.1": [_share, _one_too_many, _above], "code.2": [_first_input, _last, _each_input], "code.3": [0.1, 0.63, 0.23]}
