"""Plausible wrong answers to the exercises of the chapter on the command line."""


def _best_on_test(validation, test, tuned): return tuned - max(test.values())
def _against_validation(validation, test, tuned): return tuned - max(validation.values())
def _other_way(validation, test, tuned): return test[max(validation, key=validation.get)] - tuned

def _highest_mean(figures, measure): return max(figures["systems"], key=lambda n: figures["systems"][n][measure])
def _touching(figures, measure):
    ends = {n: one["interval"][measure] for n, one in figures["systems"].items()}
    return next((n for n, (low, _) in ends.items() if all(low >= high for o, (_, high) in ends.items() if o != n)), None)
def _last_against_the_one_before(figures, measure):
    (*_, a), (*_, b) = [(n, one["interval"][measure]) for n, one in figures["systems"].items()][-2:]
    return list(figures["systems"])[-1] if b[0] > a[1] else None

WRONG = {"cli.1": [_best_on_test, _against_validation, _other_way], "cli.2": [_highest_mean, _touching, _last_against_the_one_before]}
