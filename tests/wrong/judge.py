"""Plausible wrong answers to the exercises of 5_evals/judge."""
import math

def _letters_must_agree(first, second): return {"A": "win", "B": "loss", "C": "tie"}[first] if first == second else "tie"
def _first_only(first, second): return {"A": "win", "B": "loss", "C": "tie"}[first]
def _one_win_is_enough(first, second):
    score = {"A": 1, "B": -1, "C": 0}[first] - {"A": 1, "B": -1, "C": 0}[second]
    return "win" if score > 0 else "loss" if score < 0 else "tie"

def _share(z): return 100/(1 + math.exp(-z))
def _mean_inside(theta, phi, deltas): return _share(theta + phi*sum(map(math.tanh, deltas))/len(deltas)), _share(theta)
def _no_tanh(theta, phi, deltas): return sum(_share(theta + phi*d) for d in deltas)/len(deltas), _share(theta)
def _mean_length(theta, phi, deltas): return sum(_share(theta + phi*math.tanh(d)) for d in deltas)/len(deltas), _share(theta + phi*math.tanh(sum(deltas)/len(deltas)))
def _shares(theta, phi, deltas): return sum(_share(theta + phi*math.tanh(d)) for d in deltas)/len(deltas)/100, _share(theta)/100

WRONG = {"judge.1": [_letters_must_agree, _first_only, _one_win_is_enough], "judge.2": [_mean_inside, _no_tanh, _mean_length, _shares], "judge.3": [72.0, 42.0, 60.0, 50.0]}
