"""Plausible wrong answers to the exercises of the chapter on comparing."""
import math


def _half_width(p, width): return math.ceil(1.96**2 * p * (1 - p) / width**2)
def _rounded_down(p, width): return int((2 * 1.96) ** 2 * p * (1 - p) / width**2)
def _no_square(p, width): return math.ceil(2 * 1.96 * p * (1 - p) / width)

def _bonferroni(ps): return [min(1.0, len(ps) * p) for p in ps]
def _in_sorted_order(ps): return [min(1.0, (len(ps) - k) * p) for k, p in enumerate(sorted(ps))]
def _never_raised(ps): return [min(1.0, (len(ps) - sorted(ps).index(p)) * p) for p in ps]

WRONG = {"compare.1": [_half_width, _rounded_down, _no_square], "compare.2": [_bonferroni, _in_sorted_order, _never_raised], "compare.3": [3000, 2994, 1000]}
