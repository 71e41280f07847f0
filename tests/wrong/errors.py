"""Plausible wrong answers to the exercises of the chapter on kinds of error."""
from ftcourse.evals.errors import edit_distance


def _over_words(words, n): return 1 - len({tuple(words[i:i + n]) for i in range(len(words) - n + 1)}) / (len(words) or 1)
def _counts_first_ones(words, n):
    runs = [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
    return sum(runs.count(r) > 1 for r in runs) / len(runs) if runs else 0
def _one_run_short(words, n):
    runs = [tuple(words[i:i + n]) for i in range(len(words) - n)]
    return 1 - len(set(runs)) / len(runs) if runs else 0

def _swap_costs_two(a, b): return edit_distance(a, b)
def _any_swap(a, b): return 1 if sorted(a) == sorted(b) and a != b else edit_distance(a, b)
def _edited_twice(a, b): return min([edit_distance(a, b)] + [1 + edit_distance(a[:i] + a[i + 1] + a[i] + a[i + 2:], b) for i in range(len(a) - 1)])

WRONG = {"errors.1": [_over_words, _counts_first_ones, _one_run_short], "errors.2": [_swap_costs_two, _any_swap, _edited_twice]}
