"""Plausible wrong answers to the exercises of 2_data/checks."""


def _crashes(rows): return sum(not any(m["role"] == "assistant" for m in row["messages"]) for row in rows)
def _last_only(rows): return sum(not (isinstance(r, dict) and r.get("messages") and isinstance(r["messages"][-1], dict) and r["messages"][-1].get("role") == "assistant") for r in rows)
def _skips_broken(rows): return sum(not any(m.get("role") == "assistant" for m in r["messages"] if isinstance(m, dict)) for r in rows if isinstance(r, dict) and isinstance(r.get("messages"), list))


def _sum_of_sizes(a, b):
    a, b = set(a.casefold().split()), set(b.casefold().split())
    return len(a & b) / (len(a) + len(b)) if a or b else 0.0


def _with_case(a, b):
    a, b = set(a.split()), set(b.split())
    return len(a & b) / len(a | b) if a or b else 0.0


def _counts_repeats(a, b):
    a, b = a.casefold().split(), b.casefold().split()
    return sum(w in b for w in a) / len({*a, *b}) if a or b else 0.0


WRONG = {
    "checks.1": [lambda n: 100 // n, lambda n: round(100 / n), lambda n: 100 // n + 1, lambda n: min(25, max(3, 100 // n))],
    "checks.2": [_crashes, _last_only, _skips_broken],
    "checks.3": [_sum_of_sizes, _with_case, _counts_repeats],
}
