"""Plausible wrong answers to the exercises of 4_align/objectives."""
def _same_shape_only(methods, data, reference): return sorted(n for n, wants, needs in methods if wants == data and (reference or not needs))
def _must_need_it(methods, data, reference):
    usable = {"pairs": ("pairs", "labels"), "labels": ("labels",), "ranking": ("ranking", "pairs", "labels")}[data]
    return sorted(n for n, wants, needs in methods if wants in usable and needs == reference)
def _anything_from_labels(methods, data, reference):
    usable = {"pairs": ("pairs", "labels"), "labels": ("labels", "pairs"), "ranking": ("ranking", "pairs", "labels")}[data]
    return sorted(n for n, wants, needs in methods if wants in usable and (reference or not needs))

def _no_mismatched(data, reference, n, epochs, kept): return n*epochs + (n*(1 if kept else epochs) if reference else 0)
def _never_kept(data, reference, n, epochs, kept):
    n += data == "labels"
    return n*epochs*(2 if reference else 1)
def _kept_is_free(data, reference, n, epochs, kept):
    n += data == "labels"
    return n*epochs + (n*epochs if reference and not kept else 0)
def _policy_only_mismatch(data, reference, n, epochs, kept):
    return (n + (data == "labels"))*epochs + (n*(1 if kept else epochs) if reference else 0)

WRONG = {"objectives.1": [_same_shape_only, _must_need_it, _anything_from_labels],
         "objectives.2": [_no_mismatched, _never_kept, _kept_is_free, _policy_only_mismatch],
         "objectives.3": [1.0986, 0.549, 0.0, 4.394]}
