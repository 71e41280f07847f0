"Plausible wrong answers to the exercises of the chapter on models."
import math


def _plain_range(mask): return list(range(len(mask)))
def _cumsum(mask): return [sum(mask[:i + 1]) for i in range(len(mask))]
def _left_only(mask): return [max(0, i - mask.index(1)) for i in range(len(mask))]


def _softmax(zs):
    top = max(zs)
    return [math.exp(z - top)/sum(math.exp(y - top) for y in zs) for z in zs]


def _multiplied(logits, temperature): return _softmax([z*temperature for z in logits])
def _after(logits, temperature): return [p/temperature for p in _softmax(logits)]
def _overflows(logits, temperature): return [math.exp(z/temperature)/sum(math.exp(y/temperature) for y in logits) for z in logits]


def _by_sum(logps, lengths): return logps.index(max(logps))
def _lowest(logps, lengths):
    means = [l/n for l, n in zip(logps, lengths)]
    return means.index(min(means))
def _last_of_equals(logps, lengths): return max(range(len(logps)), key=lambda i: (logps[i]/lengths[i], i))


WRONG = {
    "models.1": [_plain_range, _cumsum, _left_only],
    "models.2": [_multiplied, _after, _overflows],
    "models.3": [_by_sum, _lowest, _last_of_equals],
}
