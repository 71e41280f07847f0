"""Plausible wrong answers to the exercises of the chapter on data sets."""
from ftcourse.data.sets import word_ngrams


def _of_the_first(a, b, n):
    a, b = set(word_ngrams(a, n)), set(word_ngrams(b, n))
    return len(a & b) / len(a) if a else 0.0


def _with_repeats(a, b, n):
    a, b = word_ngrams(a, n), word_ngrams(b, n)
    return sum(g in b for g in a) / len(set(a + b)) if a + b else 0.0


def _empty_union(a, b, n):
    a, b = set(word_ngrams(a, n)), set(word_ngrams(b, n))
    return len(a & b) / len(a | b)


def _first_code_only(rows):
    first = [r["acceptable"][0] for r in rows]
    return max(first.count(c) for c in first) / len(rows)


def _count_not_share(rows): return max(sum(c in r["acceptable"] for r in rows) for r0 in rows for c in r0["acceptable"])


WRONG = {
    "sets.1": [_of_the_first, _with_repeats, _empty_union],
    "sets.2": [_first_code_only, _count_not_share],
    "sets.3": ["(tired) (coffee)", "(like)", "(tired) or whatever", "(tired) 🎉"],
}
