"""Plausible wrong answers to the exercises of 3_tune/loop."""


def _fresh(lr, n): return (1 - lr) ** n


def _steps_first(lr, n):  # moves by the total before this step's gradient is in it
    w, total = 1.0, 0.0
    for _ in range(n):
        w -= lr * total
        total += w
    return w


def _no_shift(choices, labels):
    pairs = [(c, l) for c, l in zip(choices, labels) if l != -100]
    return sum(c == l for c, l in pairs) / len(pairs)


def _counts_masked(choices, labels):
    pairs = list(zip(choices, labels[1:]))
    return sum(c == l for c, l in pairs) / len(pairs)


def _gap_only(train, val, base): return "overfitting" if train - val > 0.2 else "fine"


def _gap_is_under(train, val, base): return "underfitting" if train - val > 0.2 else "fine"


def _fixed_mark(train, val, base): return "underfitting" if train < 0.5 else "overfitting" if train - val > 0.2 else "fine"


WRONG = {"loop.1": [_fresh, _steps_first], "loop.2": [_no_shift, _counts_masked], "loop.3": [_gap_only, _gap_is_under, _fixed_mark]}
