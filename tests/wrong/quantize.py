"""Plausible wrong answers to the exercises of 3_tune/quantize."""
WRONG = {
    "quantize.1": [
        lambda block, second: 4 + 32 / block,  # the scales stay in 32 bits
        lambda block, second: 4 + 16 / block if second is None else 4 + 8 / block,  # 16-bit scales, and the second ones forgotten
        lambda block, second: 4 + (32 if second is None else 8) / block + (0 if second is None else 32 / second),  # second scales shared by too few weights
        lambda block, second: 4.0,  # codes only
    ],
    "quantize.2": [
        lambda row: [int(x / max(map(abs, row)) * 127) if any(row) else 0 for x in row],  # cut, not rounded
        lambda row: [round(x / (max(row, default=0) or 1) * 127) for x in row],  # the largest, not the largest absolute value
        lambda row: [round(x / (max(map(abs, row), default=0) or 1) * 128) for x in row],  # 128 doesn't fit into int8
        lambda row: [round(x / max(map(abs, row)) * 127) for x in row],  # fails where all are 0
    ],
    "quantize.3": [16, 2, 3, 0, 63, None],
}
