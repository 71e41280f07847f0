"""Plausible wrong answers to the chapter on training with preferences."""

WRONG = {
    "prefer.1": [lambda p, n, K: K*(p + n)/(p + K*n), lambda p, n, K: K*(K - 1)/2*(p + n)/(p + K*n), lambda p, n, K: K*(K - 1)*(p + n)/(p + n)],
    "prefer.2": [lambda s: [(i, j) for i in range(len(s)) for j in range(i + 1, len(s)) if s[i] is not None and s[j] is not None and s[i] > s[j]],
                 lambda s: [(i, j) for i, a in enumerate(s) for j, b in enumerate(s) if i != j and a is not None and b is not None and a >= b],
                 lambda s: [(i, j) for i, a in enumerate(s) for j, b in enumerate(s) if (a or 0) > (b or 0)]],
}
