"""The table of objectives against the losses it speaks of."""
import inspect, math, subprocess, sys

import pytest
import torch

from ftcourse.align.objectives import METHODS, get_method, methods_table

KNOWN = {"pairs": {"chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps", "chosen_len", "rejected_len", "chosen_mean_logps", "rejected_mean_logps", "nll"},
         "labels": {"logps", "ref_logps", "desirable", "kl"}, "ranking": {"mean_logps", "scores", "nll_best"}}
EACH = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def _arguments(method): return inspect.signature(method.function()).parameters


def _numbers(logps, ref_logps, lengths):
    "Every argument that a loss may ask for, of B = 3 pairs: (2, 3) tensors of chosen and rejected."
    means = logps/lengths
    return dict(chosen_logps=logps[0], rejected_logps=logps[1], ref_chosen_logps=ref_logps[0], ref_rejected_logps=ref_logps[1], chosen_len=lengths[0], rejected_len=lengths[1],
                chosen_mean_logps=means[0], rejected_mean_logps=means[1], nll=-means[0], logps=logps[0], ref_logps=ref_logps[0], desirable=torch.tensor([True, False, True]),
                kl=torch.tensor(0.), mean_logps=means.T, scores=torch.tensor([[1., 0.]]*3), nll_best=-means[0])


def _losses(method, numbers):
    return method.function()(**{k: v for k, v in numbers.items() if k in KNOWN[method.data] & set(_arguments(method))},
                             **{k: p.default for k, p in method.parameters.items()}, reduction="none")


LOGPS, REF, LENGTHS = torch.tensor([[-6., -30., -9.], [-11., -8., -9.5]]), torch.tensor([[-8., -28., -9.], [-10., -9., -9.]]), torch.tensor([[4., 20., 5.], [5., 4., 6.]])


@EACH
def test_every_argument_is_known_and_every_default_is_the_codes(method):
    args = _arguments(method)
    allowed = KNOWN[method.data] | set(method.parameters) | {"reduction"} | ({"label_smoothing"} if method.name == "dpo" else set())
    assert set(args) <= allowed and set(method.parameters) <= set(args)
    for name, p in method.parameters.items():
        assert args[name].default == (0.0 if name == "label_smoothing" else p.default), name
        assert p.low <= p.high and p.what
    assert args["reduction"].default == "mean"


@EACH
def test_a_reference_counts_where_the_table_says_so(method):
    before = _losses(method, _numbers(LOGPS, REF, LENGTHS))
    assert before.shape == (3,) and before.isfinite().all()
    moved = _losses(method, _numbers(LOGPS, REF + torch.tensor([[1.], [3.]]), LENGTHS))
    assert torch.equal(before, moved) is not method.reference
    both = _losses(method, _numbers(LOGPS + 1, REF + 1, LENGTHS))       # what counts is the ratio
    if method.reference: torch.testing.assert_close(before, both)


@EACH
def test_normalised_means_that_twice_the_tokens_with_the_same_mean_change_nothing(method):
    before, after = (_losses(method, _numbers(k*LOGPS, k*REF, k*LENGTHS)) for k in (1, 2))
    assert torch.allclose(before, after) is method.normalised


def test_lookup():
    assert get_method("kto") is METHODS["kto"] and list(METHODS) == [m.name for m in METHODS.values()]
    assert set(METHODS) == {"dpo", "cdpo", "robust", "ipo", "rdpo", "simpo", "cpo", "orpo", "slic", "rrhf", "kto"}
    with pytest.raises(ValueError, match="rrhf, kto"): get_method("ppo")
    assert METHODS["cdpo"].function() is METHODS["dpo"].function() and METHODS["cdpo"].parameters["label_smoothing"].default == 0.1
    with pytest.raises(AttributeError): METHODS["dpo"].lr = 1.


def test_table():
    lines = methods_table().split("\n")
    cells = [[c.strip() for c in line.strip("| ").split("|")] for line in lines]
    assert len({len(line) for line in lines}) == 1 and [c[0] for c in cells[2:]] == list(METHODS)
    assert cells[2] == ["dpo", "pairs", "yes", "no", "beta=0.1"] and cells[-1][1] == "labels"


def test_read_without_torch():
    code = "import sys, ftcourse.align.objectives as o; o.methods_table(); sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_conservative_dpo_turns_where_exercise_3_says():
    x = torch.tensor([math.log(3)/.5], dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(1, dtype=torch.float64)
    get_method("cdpo").function()(x, zeros, zeros, zeros, beta=.5, label_smoothing=.25).backward()
    assert abs(x.grad.item()) < 1e-12
