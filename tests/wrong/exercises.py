"""Plausible wrong answers to the exercises of 1_start/exercises."""
import math

WRONG = {
    "exercises.1": [
        lambda probs: math.log(math.prod(probs)),  # underflows for a long reply
        lambda probs: sum(math.log2(p) for p in probs),  # bits, not nats
        lambda probs: sum(math.log(p) for p in probs) / len(probs),  # the mean
        lambda probs: -sum(math.log(p) for p in probs),  # the loss, not the log-probability
    ],
    "exercises.2": [math.exp(6), math.exp(-2), 2.0, 2**2, None],
}
