"""Plausible wrong answers to the exercises of 5_evals/benchmarks."""

def _plain(logps, choices): return max(range(len(choices)), key=lambda k: logps[k])
def _bytes(logps, choices): return max(range(len(choices)), key=lambda k: logps[k]/len(choices[k].encode()))
def _words(logps, choices): return max(range(len(choices)), key=lambda k: logps[k]/len(choices[k].split()))
def _lowest(logps, choices): return min(range(len(choices)), key=lambda k: logps[k]/len(choices[k]))
def _last(logps, choices): return max(reversed(range(len(choices))), key=lambda k: logps[k]/len(choices[k]))

def _one_break(description, solved, question): return description + "".join(f"{q} {a}\n" for q, a in solved) + question
def _no_space(description, solved, question): return description + "".join(f"{q}{a}\n\n" for q, a in solved) + question
def _space_behind(description, solved, question): return description + "".join(f"{q} {a}\n\n" for q, a in solved) + question + " "
def _description_last(description, solved, question): return "".join(f"{q} {a}\n\n" for q, a in solved) + description + question

WRONG = {"benchmarks.1": [_plain, _bytes, _words, _lowest, _last], "benchmarks.2": [_one_break, _no_space, _space_behind, _description_last], "benchmarks.3": [0.014, 0.959, 0.027, 0.25]}
