"""Plausible wrong answers to the exercises of 5_evals/metrics."""

def _grams(words, n): return [tuple(words[i:i+n]) for i in range(len(words) - n + 1)]
def _unclipped(prediction, reference, n):
    mine = _grams(prediction, n)
    return sum(g in _grams(reference, n) for g in mine), len(mine)
def _types(prediction, reference, n):
    mine = set(_grams(prediction, n))
    return len(mine & set(_grams(reference, n))), len(mine)
def _recall(prediction, reference, n):
    mine, theirs = _grams(prediction, n), _grams(reference, n)
    return sum(min(mine.count(g), theirs.count(g)) for g in set(mine)), len(theirs)
def _one_short(prediction, reference, n):
    grams = lambda words: [tuple(words[i:i+n]) for i in range(len(words) - n)]
    mine, theirs = grams(prediction), grams(reference)
    return sum(min(mine.count(g), theirs.count(g)) for g in set(mine)), len(mine)

def _the_same(by_token, n_tokens, n_words): return by_token
def _times(by_token, n_tokens, n_words): return by_token*n_tokens/n_words
def _upside_down(by_token, n_tokens, n_words): return by_token**(n_words/n_tokens)

WRONG = {"metrics.1": [_unclipped, _types, _recall, _one_short], "metrics.2": [_the_same, _times, _upside_down],
         "metrics.3": ["Athens is the capital of Greece", "The Athens is capital of Greece!", "Sparta is the capital of Greece", "Athens"]}
