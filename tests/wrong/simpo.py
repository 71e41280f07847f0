"""Plausible wrong answers to the chapter on SimPO."""
import math

from torch.nn import functional as F


def _simpo(chosen, rejected, beta, ratio): return -F.logsigmoid(beta*(chosen - rejected - ratio)).mean()

def _sums(c, r, c_len, r_len, beta, ratio): return _simpo(c, r, beta, ratio)
def _absolute_gamma(c, r, c_len, r_len, beta, ratio): return _simpo(c/c_len, r/r_len, beta, ratio/beta)
def _no_margin(c, r, c_len, r_len, beta, ratio): return _simpo(c/c_len, r/r_len, beta, 0)
def _margin_the_wrong_way(c, r, c_len, r_len, beta, ratio): return _simpo(c/c_len, r/r_len, beta, -ratio)
def _one_length(c, r, c_len, r_len, beta, ratio): return _simpo(c/c_len, r/c_len, beta, ratio)
def _summed_over_pairs(c, r, c_len, r_len, beta, ratio): return _simpo(c/c_len, r/r_len, beta, ratio)*len(c)

def _same_gamma(beta, gamma_ratio): return dict(loss_type="simpo", cpo_alpha=0., beta=beta, simpo_gamma=gamma_ratio)
def _divided(beta, gamma_ratio): return dict(loss_type="simpo", cpo_alpha=0., beta=beta, simpo_gamma=gamma_ratio/beta)
def _with_nll(beta, gamma_ratio): return dict(loss_type="simpo", cpo_alpha=1., beta=beta, simpo_gamma=beta*gamma_ratio)
def _cpo_alpha_left_out(beta, gamma_ratio): return dict(loss_type="simpo", beta=beta, simpo_gamma=beta*gamma_ratio)

def _rounded_down(chosen_mean, rejected_mean, rejected_len): return math.floor(rejected_len*rejected_mean/chosen_mean)
def _upside_down(chosen_mean, rejected_mean, rejected_len): return math.ceil(rejected_len*chosen_mean/rejected_mean) - 1
def _minus_one(chosen_mean, rejected_mean, rejected_len): return math.floor(rejected_len*rejected_mean/chosen_mean) - 1

WRONG = {"simpo.1": [_sums, _absolute_gamma, _no_margin, _margin_the_wrong_way, _one_length, _summed_over_pairs],
         "simpo.2": [_same_gamma, _divided, _with_nll, _cpo_alpha_left_out], "simpo.3": [_rounded_down, _upside_down, _minus_one]}
