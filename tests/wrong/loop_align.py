"""Plausible wrong answers to the exercises of 4_align/loop, whose numbers go on from those of 3_tune/loop."""
def _sums(probs, n):
    upto = [sum(probs[:i+1]) for i in range(len(probs))]
    return [u**n for u in upto]
def _worst(probs, n):
    over = [sum(probs[i:]) for i in range(len(probs) + 1)]
    return [over[i]**n - over[i+1]**n for i in range(len(probs))]
def _powers(probs, n):
    total = sum(p**n for p in probs)
    return [p**n/total for p in probs]
def _at_least_once(probs, n): return [1 - (1 - p)**n for p in probs]

def _ratio(n, total): return -(-total//n)
def _too_many(n, total):
    rounds, reached = 0, 1
    while reached <= total: rounds, reached = rounds + 1, reached*n
    return rounds
def _sum_of_draws(n, total): return -(-(total - 1)//n)
def _rounded_down(n, total):
    rounds = 0
    while n**(rounds + 1) <= total: rounds += 1
    return rounds

WRONG = {"loop.4": [_sums, _worst, _powers, _at_least_once], "loop.5": [_ratio, _too_many, _sum_of_draws, _rounded_down], "loop.6": [5, 4, 8, 5.19]}
