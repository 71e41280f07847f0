"""Plausible wrong answers to the exercises of 3_tune/lora."""
WRONG = {
    "lora.1": [
        lambda d, k: d * k // (d + k),  # equal counts are not fewer
        lambda d, k: min(d, k),  # the largest rank the matrix can have
        lambda d, k: d * k // (2 * max(d, k)),  # right for square matrices only, and there off by one
    ],
    "lora.2": [
        lambda alpha, r, new_r: alpha,  # the scale changes
        lambda alpha, r, new_r: alpha * r / new_r,  # upside down
        lambda alpha, r, new_r: alpha * (new_r / r) ** 0.5,  # rsLoRA's
    ],
    "lora.3": [8 * (576 + 192), 576 * 8, 8 * 192, None],
}
