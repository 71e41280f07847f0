"""Plausible wrong answers to the chapter on the DPO family."""
import math


def _target_is_one_over_tau(c, r, ref_c, ref_r, tau): return (c - ref_c - r + ref_r - 1/tau)**2
def _scaled_by_tau(c, r, ref_c, ref_r, tau): return (tau*(c - ref_c - r + ref_r) - 1/(2*tau))**2
def _no_reference(c, r, ref_c, ref_r, tau): return (c - r - 1/(2*tau))**2
def _stops_beyond(c, r, ref_c, ref_r, tau): return max(0., 1/(2*tau) - (c - ref_c - r + ref_r))**2
def _the_wrong_way_round(c, r, ref_c, ref_r, tau): return (r - ref_r - c + ref_c - 1/(2*tau))**2

def _minus_the_length(gap, c, r, beta, alpha): return beta/(1 + math.exp(beta*gap - alpha*(c - r)))
def _without_beta(gap, c, r, beta, alpha): return 1/(1 + math.exp(beta*gap + alpha*(c - r)))
def _length_inside_beta(gap, c, r, beta, alpha): return beta/(1 + math.exp(beta*(gap + alpha*(c - r))))
def _sigma_of_m(gap, c, r, beta, alpha): return beta/(1 + math.exp(-beta*gap - alpha*(c - r)))

def _as_written(x): return math.log(1 - math.exp(x))
def _only_expm1(x): return math.log(-math.expm1(x))
def _only_log1p(x): return math.log1p(-math.exp(x))
def _branches_exchanged(x): return math.log1p(-math.exp(x)) if x > -math.log(2) else math.log(-math.expm1(x))

WRONG = {"zoo.1": [_target_is_one_over_tau, _scaled_by_tau, _no_reference, _stops_beyond, _the_wrong_way_round],
         "zoo.2": [_minus_the_length, _without_beta, _length_inside_beta, _sigma_of_m],
         "zoo.3": [_as_written, _only_expm1, _only_log1p, _branches_exchanged]}
