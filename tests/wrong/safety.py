"""Plausible wrong answers to the exercises of the chapter on safety."""


def _both_refused(h, g): return h * g
def _difference(h, g): return h - g

def _only_the_other(pairs): return [(o, "she" if w == "he" else "he") for o, w in pairs]
def _at_the_end(pairs): return pairs + _only_the_other(pairs)

WRONG = {"safety.1": [_both_refused, _difference], "safety.2": [_only_the_other, _at_the_end]}
