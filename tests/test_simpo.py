"""SimPO: numbers by hand, its length invariance, the two units of its margin, its optimum by enumeration, and TRL's own trainer."""
import inspect, itertools, math

import pytest
import torch
from torch.testing import assert_close
from trl_stub import random_table, reply_sums, token_logps, trl_loss

from ftcourse.align.dpo import fit_policy
from ftcourse.align.simpo import simpo_loss


def draw(*shape, seed=0, dtype=torch.float64): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
def numbers(*xs, dtype=torch.float64): return [torch.tensor(x, dtype=dtype) for x in xs]
CASE = numbers([-10.], [-6.], [10.], [4.])  # means -1 and -1.5: a lead of 0.5


# --- values and gradients by hand ------------------------------------------------------------------------------------
def test_means_not_sums():
    # item 71: by sums the rejected reply is ahead, by means the chosen one, by 0.5; times beta = 2 it is 1
    assert simpo_loss(*CASE, beta=2., gamma_ratio=0.).item() == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-12)
    assert simpo_loss(*CASE, beta=4., gamma_ratio=0.).item() == pytest.approx(math.log(1 + math.exp(-2)), abs=1e-12)


def test_there_is_no_reference():
    # item 71
    assert not [name for name in inspect.signature(simpo_loss).parameters if "ref" in name]


def test_the_margin_is_gamma_over_beta():
    # item 72: a lead of exactly gamma/beta costs ln 2, whatever beta
    for beta in (.5, 2., 10.): assert simpo_loss(*CASE, beta=beta, gamma_ratio=.5).item() == pytest.approx(math.log(2), abs=1e-12)
    # the paper's gamma is beta times as much: beta 2.5, gamma 1.375 for Llama-3-Instruct
    paper = -math.log(1/(1 + math.exp(-(2.5*.5 - 1.375))))
    assert simpo_loss(*CASE, beta=2.5, gamma_ratio=.55).item() == pytest.approx(paper, abs=1e-12)


@pytest.mark.parametrize("k", [1, 2, 7])
def test_repeating_a_reply_changes_nothing(k):
    # item 73: the same per-token numbers k times over, for one reply of the pair or both
    chosen, rejected = [-.5, -2., -1.], [-3., -.25]
    def loss(a, b): return simpo_loss(*numbers([sum(a)], [sum(b)], [float(len(a))], [float(len(b))])).item()
    for a, b in ((chosen*k, rejected), (chosen, rejected*k), (chosen*k, rejected*k)): assert loss(a, b) == pytest.approx(loss(chosen, rejected), abs=1e-12)


def test_defaults():
    # item 74: where the authors say to begin
    defaults = {n: p.default for n, p in inspect.signature(simpo_loss).parameters.items()}
    assert 2 <= defaults["beta"] <= 2.5 and defaults["gamma_ratio"] == .5
    assert simpo_loss(*CASE).item() == pytest.approx(math.log(2), abs=1e-12)


def test_the_registry_has_the_authors_ranges():
    # item 74
    objectives = pytest.importorskip("ftcourse.align.objectives")
    parameters = objectives.get_method("simpo").parameters
    assert (parameters["beta"].default, parameters["gamma_ratio"].default) == (2., .5)
    assert (parameters["beta"].high, parameters["gamma_ratio"].low, parameters["gamma_ratio"].high) == (10., 0., 1.)


def test_gradient():
    # beta/|y| * sigmoid(gamma - beta*lead), up for the chosen reply and down for the rejected one
    lens = numbers([3., 8., 1.], [5., 2., 9.])
    points = [draw(3).requires_grad_(), draw(3, seed=1).requires_grad_()]
    grads = torch.autograd.grad(simpo_loss(*points, *lens, beta=2.5, gamma_ratio=.3, reduction="none").sum(), points)
    for b in range(3):
        lead = points[0][b].item()/lens[0][b].item() - points[1][b].item()/lens[1][b].item()
        weight = 2.5/(1 + math.exp(2.5*(lead - .3)))
        assert [g[b].item() for g in grads] == pytest.approx([-weight/lens[0][b].item(), weight/lens[1][b].item()], rel=1e-9)
    assert torch.autograd.gradcheck(lambda *p: simpo_loss(*p, *lens, beta=2.5, gamma_ratio=.3), points)


# --- the optimum, by enumeration -------------------------------------------------------------------------------------
@pytest.mark.parametrize("beta", [1., 2.5, 10.])
def test_bradley_terry_pairs_lead_to_rewards_per_token(beta):
    # item 71: all replies of one or two tokens over V = 3; at gamma = 0 the leads per token are the differences of rewards / beta
    sizes = torch.tensor([1.]*3 + [2.]*9, dtype=torch.float64)
    rewards = draw(12)
    i, j = torch.tensor(list(itertools.permutations(range(12), 2))).T
    often = 1/(1 + (rewards[j] - rewards[i]).exp())
    fitted = fit_policy(lambda logps: (often*simpo_loss(logps[i], logps[j], sizes[i], sizes[j], beta, 0., reduction="none")).sum(), 12)
    assert fitted.exp().sum().item() == pytest.approx(1)
    leads = fitted/sizes - rewards/beta  # one number for all
    assert_close(leads, leads.mean().expand(12), atol=1e-6, rtol=0)


# --- shapes, precision, refusals ---------------------------------------------------------------------------------------
def test_reductions_lengths_as_integers_and_16_bits():
    losses = simpo_loss(draw(4), draw(4, seed=1), torch.tensor([1, 2, 3, 4]), torch.tensor([4, 3, 2, 1]), reduction="none")
    assert losses.shape == (4,)
    assert simpo_loss(draw(4), draw(4, seed=1), torch.tensor([1, 2, 3, 4]), torch.tensor([4, 3, 2, 1])).item() == pytest.approx(sum(losses.tolist())/4, abs=1e-6)
    half = [x.bfloat16() for x in CASE]
    assert simpo_loss(*half).dtype == torch.float32 and simpo_loss(*half).item() == pytest.approx(math.log(2), abs=1e-6)
    assert simpo_loss(*numbers([-1e5], [-1.], [1.], [1.])).item() == pytest.approx(2*(1e5 - 1 + .5))  # no inf


@pytest.mark.parametrize("bad,match", [(dict(beta=0), "beta=0"), (dict(gamma_ratio=-.1), "gamma_ratio=-0.1"), (dict(reduction="sum"), "'mean' and 'none'")])
def test_options_that_cannot_be(bad, match):
    with pytest.raises(ValueError, match=match): simpo_loss(*CASE, **bad)


def test_replies_and_shapes_that_cannot_be():
    with pytest.raises(ValueError, match="no tokens"): simpo_loss(*CASE[:3], torch.zeros(1))
    with pytest.raises(ValueError, match="no tokens"): simpo_loss(*CASE[:2], torch.zeros(1), CASE[3])
    with pytest.raises(ValueError, match="shapes"): simpo_loss(*CASE[:3], torch.ones(1, 1))


# --- TRL ------------------------------------------------------------------------------------------------------------------
PROMPTS, CHOSEN, REJECTED = [[1, 2], [3], [4, 5, 6]], [[1, 2, 3], [4], [5, 6]], [[7, 8], [9, 10, 11, 12], [1]]

@pytest.mark.slow
@pytest.mark.parametrize("beta,gamma_ratio", [(2., .5), (2.5, .55), (10., .3), (2., 0.)])
def test_trl_s_loss(beta, gamma_ratio):
    # item 71
    # item 72: TRL's simpo_gamma is beta times ours
    pytest.importorskip("trl")
    policy = random_table(0)
    theirs = trl_loss("CPO", policy, None, PROMPTS, (CHOSEN, REJECTED), loss_type="simpo", cpo_alpha=0., beta=beta, simpo_gamma=beta*gamma_ratio)
    sums = [reply_sums(policy, PROMPTS, replies) for replies in (CHOSEN, REJECTED)]
    lens = [torch.tensor([len(token_logps(policy, x, y)) for x, y in zip(PROMPTS, replies)]) for replies in (CHOSEN, REJECTED)]
    assert_close(simpo_loss(*sums, *lens, beta, gamma_ratio), theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.slow
def test_the_exercise_s_settings_are_trl_s(tmp_path):
    # item 72
    pytest.importorskip("trl")
    from trl.experimental.cpo import CPOConfig
    from ftcourse.exercises import find
    settings = find("simpo.2").solution(2.5, .4)
    args = CPOConfig(output_dir=str(tmp_path), report_to="none", bf16=False, use_cpu=True, **settings)
    assert all(getattr(args, name) == value for name, value in settings.items())
    assert CPOConfig(output_dir=str(tmp_path), report_to="none", bf16=False, use_cpu=True).cpo_alpha != 0  # so it must be set
