"""Plausible wrong answers to the exercises of 3_tune/memory."""
WRONG = {
    "memory.1": [
        lambda n, stage, devices: 16 * n / (devices if stage else 1),  # every stage shares everything
        lambda n, stage, devices: n * sum(b / (devices if stage >= s else 1) for b, s in ((2, 1), (2, 2), (12, 3))),  # the weights first
        lambda n, stage, devices: n * sum(b / (devices if stage > s else 1) for b, s in ((12, 1), (2, 2), (2, 3))),  # a stage late
        lambda n, stage, devices: n * sum(b / (devices if stage >= s else 1) for b, s in ((8, 1), (2, 2), (2, 3))),  # without the 32-bit copy
    ],
    "memory.2": [
        lambda n, vocab: 2 * n // (12 * vocab),  # not yet more
        lambda n, vocab: -(-2 * n // (12 * vocab)),  # as much is not more
        lambda n, vocab: 2 * n // (4 * vocab) + 1,  # the logits once, in 32 bits
        lambda n, vocab: 4 * n // (12 * vocab) + 1,  # weights in 32 bits
    ],
    "memory.3": [
        lambda n, layer, kept: round(n**0.5),  # right only where both sizes are the same
        lambda n, layer, kept: 1,  # every layer
        lambda n, layer, kept: min(range(1, n + 1), key=lambda k: n // k * kept + k * layer),  # the last, shorter group forgotten
        lambda n, layer, kept: min(range(n, 0, -1), key=lambda k: -(-n // k) * kept + k * layer),  # the larger of equals
    ],
}
