"""Plausible wrong answers to the exercises of 4_align/kto."""
import math

def _sigma(x): return 1/(1 + math.exp(-x))
def _without_z(logp, ref_logp, good, z, beta, w_d, w_u): return w_d*_sigma(-beta*(logp - ref_logp)) if good else w_u*_sigma(beta*(logp - ref_logp))
def _same_sign(logp, ref_logp, good, z, beta, w_d, w_u): return (w_d if good else w_u)*_sigma(-beta*(logp - ref_logp - z))
def _z_turns_too(logp, ref_logp, good, z, beta, w_d, w_u): return w_d*_sigma(-beta*(logp - ref_logp - z)) if good else w_u*_sigma(beta*(logp - ref_logp + z))
def _z_outside_beta(logp, ref_logp, good, z, beta, w_d, w_u):
    gain = beta*(logp - ref_logp) - z
    return w_d*_sigma(-gain) if good else w_u*_sigma(gain)
def _log_sigmoid(logp, ref_logp, good, z, beta, w_d, w_u):
    gain = beta*(logp - ref_logp - z)
    return -w_d*math.log(_sigma(gain)) if good else -w_u*math.log(_sigma(-gain))
def _value_not_loss(logp, ref_logp, good, z, beta, w_d, w_u):
    gain = beta*(logp - ref_logp - z)
    return w_d*_sigma(gain) if good else w_u*_sigma(-gain)

def _plain_rotation(prompts): return [(i + 1) % len(prompts) for i in range(len(prompts))]
def _reversal(prompts): return list(range(len(prompts)))[::-1]
def _first_other(prompts): return [next(j for j, q in enumerate(prompts) if q != p) for p in prompts]
def _previous(prompts):
    n = len(prompts)
    return [next((i - s) % n for s in range(1, n) if prompts[(i - s) % n] != prompts[i]) for i in range(n)]

WRONG = {"kto.1": [_without_z, _same_sign, _z_turns_too, _z_outside_beta, _log_sigmoid, _value_not_loss],
         "kto.2": [_plain_rotation, _reversal, _first_other, _previous], "kto.3": [0.308, 0.444, 2.25, 0.5]}
