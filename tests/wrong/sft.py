"""Plausible wrong answers to the chapter on supervised fine-tuning."""
import math


def _all_but_system(turns): return [int(role != "system") for role, n in turns for _ in range(n)]
def _only_the_last(turns):
    last = max((i for i, (role, n) in enumerate(turns) if role == "assistant"), default=-1)
    return [int(i == last) for i, (role, n) in enumerate(turns) for _ in range(n)]
def _without_end(turns): return [int(role == "assistant" and t < n - 1) for role, n in turns for t in range(n)]

def _weights_above_only(token_logps, masks, weights):
    total = sum(w*l*m for logps, mask, w in zip(token_logps, masks, weights) for l, m in zip(logps, mask))
    return -total/sum(map(sum, masks))
def _mean_of_means(token_logps, masks, weights):
    means = [sum(l*m for l, m in zip(logps, mask))/sum(mask) for logps, mask in zip(token_logps, masks)]
    return -sum(w*m for w, m in zip(weights, means))/sum(weights)
def _wrong_sign(token_logps, masks, weights):
    total = sum(w*l*m for logps, mask, w in zip(token_logps, masks, weights) for l, m in zip(logps, mask))
    return total/sum(w*sum(mask) for mask, w in zip(masks, weights))
def _padding_counts(token_logps, masks, weights):
    return -sum(w*sum(logps) for logps, w in zip(token_logps, weights))/sum(w*len(mask) for mask, w in zip(masks, weights))

WRONG = {"sft.1": [_all_but_system, _only_the_last, _without_end], "sft.2": [_weights_above_only, _mean_of_means, _wrong_sign, _padding_counts],
         "sft.3": [0.0, 15.58, math.log10(49152), 49152]}
