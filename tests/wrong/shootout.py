"""Plausible wrong answers to the chapter that compares the objectives."""
import math

from ftcourse.align.shootout import t_quantile


def _normal_factor(effect, spread): return max(2, math.ceil((1.96*spread/effect)**2))
def _df_is_n(effect, spread):
    n = 2
    while t_quantile(n)*spread/math.sqrt(n) >= effect: n += 1
    return n
def _spread_not_divided(effect, spread):
    n = 2
    while n < 50 and t_quantile(n - 1)*spread >= effect: n += 1
    return n
def _one_too_many(effect, spread):
    n = 2
    while t_quantile(n - 1)*spread/math.sqrt(n) >= effect: n += 1
    return n + 1

def _row(rows, method): return next(r for r in rows if r["method"] == method)
def _ignores_labels(rows, method, other, measure): return round(_row(rows, method)[measure] - _row(rows, other)[measure], 1)
def _must_be_equal(rows, method, other, measure):
    a, b = _row(rows, method), _row(rows, other)
    return round(a[measure] - b[measure], 1) if a.get("labels") == b.get("labels") else None
def _other_way_round(rows, method, other, measure):
    a, b = _row(rows, method), _row(rows, other)
    return None if len({r.get("labels") for r in (a, b)} - {None}) > 1 else round(b[measure] - a[measure], 1)
def _needs_the_key(rows, method, other, measure):
    a, b = _row(rows, method), _row(rows, other)
    return None if len({r["labels"] for r in (a, b)} - {None}) > 1 else round(a[measure] - b[measure], 1)

WRONG = {"shootout.1": [_normal_factor, _df_is_n, _spread_not_divided, _one_too_many],
         "shootout.2": [_ignores_labels, _must_be_equal, _other_way_round, _needs_the_key]}
