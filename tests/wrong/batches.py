"""Plausible wrong answers to the exercises of 2_data/batches."""
def _longest_of_all(lengths, batch_size): return len(lengths) * max(lengths, default=0)
def _full_last_batch(lengths, batch_size):
    return sum(batch_size * max(lengths[i:i + batch_size]) for i in range(0, len(lengths), batch_size))

WRONG = {
    "batches.1": [
        _longest_of_all,  # pads every batch to the longest of the set
        _full_last_batch,  # counts rows that the last batch doesn't have
        lambda lengths, batch_size: sum(lengths),  # counts no padding
    ],
    "batches.2": [
        lambda p, replies: list(range(p + sum(replies))),  # the second reply goes on after the first
        lambda p, replies: list(range(p)) + [i for n in replies for i in range(n)],  # replies start again at 0
        lambda p, replies: list(range(p)) + [p - 1 + i for n in replies for i in range(n)],  # on top of the prompt's last token
    ],
    "batches.3": [
        lambda ids, n: [-100 if t == ids[-1] else t for t in ids],  # the bug itself
        lambda ids, n: list(ids[:n - 1]) + [-100] * (len(ids) - n + 1),  # loses the end token
        lambda ids, n: list(ids[:n]),  # cuts instead of masking
    ],
}
