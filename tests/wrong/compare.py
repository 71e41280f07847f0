"""Plausible wrong answers to the exercises of the chapter on comparing."""
import math


def _half_width(p, width): return math.ceil(1.96**2 * p * (1 - p) / width**2)
def _rounded_down(p, width): return int((2 * 1.96) ** 2 * p * (1 - p) / width**2)
def _no_square(p, width): return math.ceil(2 * 1.96 * p * (1 - p) / width)

def _one_sided(wins, losses): return sum(math.comb(wins + losses, k) for k in range(max(wins, losses), wins + losses + 1)) / 2 ** (wins + losses)
def _only_that_split(wins, losses): return min(1.0, 2 * math.comb(wins + losses, wins) / 2 ** (wins + losses))
def _not_cut(wins, losses): return 2 * _one_sided(wins, losses)

WRONG = {"compare.1": [_half_width, _rounded_down, _no_square], "compare.2": [_one_sided, _only_that_split, _not_cut], "compare.3": [3000, 2994, 1000]}
