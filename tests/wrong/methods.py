"""Plausible wrong answers to the exercises of 3_tune/methods."""
WRONG = {
    "methods.1": [
        lambda n, d, m: n * (2 * m * d + m + d),  # one module a block
        lambda n, d, m: n * 2 * 2 * m * d,  # no biases
        lambda n, d, m: n * 2 * (2 * m * d + 2 * m),  # the second bias has the wrong width
    ],
    "methods.2": [
        lambda W, outputs, inputs: [[i * w * o for w, o in zip(row, outputs)] for row, i in zip(W, inputs)],  # rows and columns exchanged
        lambda W, outputs, inputs: [[o * w for w in row] for row, o in zip(W, outputs)],  # the inputs' factors are lost
        lambda W, outputs, inputs: [[w / i * o for w, i in zip(row, inputs)] if 0 not in inputs else row for row, o in zip(W, outputs)],  # divides
    ],
    "methods.3": [0, 12, 11, None],
}
