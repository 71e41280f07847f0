"""Plausible wrong answers to the exercises of 4_align/rlhf."""
import math

def _put_back(k, N, n): return (k/N)**n - ((k - 1)/N)**n
def _among(k, N, n): return math.comb(k, n)/math.comb(N, n)
def _all_lower(k, N, n): return math.comb(k - 1, n)/math.comb(N, n)
def _ordered(k, N, n): return math.perm(k - 1, n - 1)/math.perm(N, n)

def _distance(alpha, beta): return math.exp(alpha/beta - 1)
def _zero(alpha, beta): return math.exp(2*alpha/beta)
def _best_of_n(alpha, beta): return (alpha/(2*beta))**2
def _upside_down(alpha, beta): return math.exp(2*(beta/alpha - 1))

WRONG = {"rlhf.1": [_put_back, _among, _all_lower, _ordered], "rlhf.2": [_distance, _zero, _best_of_n, _upside_down], "rlhf.3": [200, 133, 25, 175]}
