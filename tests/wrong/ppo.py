"""Plausible wrong answers to the exercises of 4_align/ppo."""
def _gae(rewards, values, discount, lam, bootstrap=0., shift=True, decay=None):
    found, ahead, after = [], 0., bootstrap
    for r, v in zip(rewards[::-1], values[::-1]):
        ahead = r + discount*after - v + (discount*lam if decay is None else decay)*ahead
        found.append(ahead)
        after = v if shift else 0.
    return found[::-1]
def _value_after_the_end(rewards, values, discount, lam): return _gae(rewards, values, discount, lam, bootstrap=values[-1])
def _no_next_value(rewards, values, discount, lam): return _gae(rewards, values, discount, lam, shift=False)
def _lambda_alone(rewards, values, discount, lam): return _gae(rewards, values, discount, lam, decay=lam)
def _reversed(rewards, values, discount, lam): return _gae(rewards, values, discount, lam)[::-1]
def _returns(rewards, values, discount, lam): return [a + v for a, v in zip(_gae(rewards, values, discount, lam), values)]

def _both_sides(ratio, advantage, clip): return 0. if abs(ratio - 1) > clip else -advantage*ratio
def _no_clip(ratio, advantage, clip): return -advantage*ratio
def _other_sign(ratio, advantage, clip): return 0. if (ratio > 1 + clip if advantage > 0 else ratio < 1 - clip) else advantage*ratio
def _without_ratio(ratio, advantage, clip): return 0. if (ratio > 1 + clip if advantage > 0 else ratio < 1 - clip) else -advantage
def _wrong_side(ratio, advantage, clip): return 0. if (ratio < 1 - clip if advantage > 0 else ratio > 1 + clip) else -advantage*ratio
def _fixed_clip(ratio, advantage, clip): return 0. if (ratio > 1.2 if advantage > 0 else ratio < .8) else -advantage*ratio

WRONG = {"ppo.1": [_value_after_the_end, _no_next_value, _lambda_alone, _reversed, _returns], "ppo.2": [_both_sides, _no_clip, _other_sign, _without_ratio, _wrong_side, _fixed_clip], "ppo.3": [0.588, 0.0, 1.609, 0.511]}
