"""Plausible wrong answers to the exercises of 5_evals/arena."""
import math


def _no_ties(wins, ties, losses): return 400*math.log10(wins/losses) if wins and losses else 0.
def _natural(wins, ties, losses): return 400*math.log((wins + ties/2)/(losses + ties/2))
def _turned(wins, ties, losses): return 400*math.log10((losses + ties/2)/(wins + ties/2))
def _whole_ties(wins, ties, losses): return 400*math.log10((wins + ties)/(losses + ties))

def _in_place(wins, gamma):
    M = range(len(gamma))
    for i in M: gamma[i] = sum(wins[i])/sum((wins[i][j] + wins[j][i])/(gamma[i] + gamma[j]) for j in M if j != i)
    return gamma
def _losses(wins, gamma):
    M = range(len(gamma))
    return [sum(wins[j][i] for j in M)/sum((wins[i][j] + wins[j][i])/(gamma[i] + gamma[j]) for j in M if j != i) for i in M]
def _only_wins_below(wins, gamma):
    M = range(len(gamma))
    return [sum(wins[i])/sum(wins[i][j]/(gamma[i] + gamma[j]) for j in M if j != i) for i in M]

def _met(battles):
    "Joined by battles, whoever won."
    groups = []
    for pair in battles:
        touched = [g for g in groups if g & set(pair)]
        groups = [g for g in groups if g not in touched] + [set(pair).union(*touched)]
    return len(groups) == 1
def _win_and_loss(battles): return {a for a, _ in battles} == {b for _, b in battles}
def _from_the_first(battles):
    found = {battles[0][0]}
    for _ in battles: found |= {b for a, b in battles if a in found}
    return found == {m for pair in battles for m in pair}

WRONG = {"arena.1": [_no_ties, _natural, _turned, _whole_ties], "arena.2": [_in_place, _losses, _only_wins_below], "arena.3": [_met, _win_and_loss, _from_the_first]}
