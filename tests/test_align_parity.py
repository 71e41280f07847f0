"""The DPO family beside TRL's trainers, at the same inputs: where they agree, and where they differ and by how much."""
import pytest
import torch

from ftcourse.align.simpo import simpo_loss
from ftcourse.align.zoo import cpo_loss, ipo_loss, orpo_loss, slic_loss

pytest.importorskip("trl")
from trl_stub import random_table, reply_sums, token_logps, trl_loss  # noqa: E402  after the skip

pytestmark = pytest.mark.slow
PROMPTS = [[1, 2, 3], [4], [5, 6]]
CHOSEN, REJECTED = [[7, 8], [9, 1, 2, 3, 4], [5]], [[8, 8, 8, 1], [2, 3], [6, 6, 6]]
POLICY, REF = random_table(0), random_table(1)
LEN_C, LEN_R = (torch.tensor([float(len(y)) for y in replies]) for replies in (CHOSEN, REJECTED))


def sums(table): return reply_sums(table, PROMPTS, CHOSEN), reply_sums(table, PROMPTS, REJECTED)
def theirs(name, **config): return trl_loss(name, POLICY, REF, PROMPTS, (CHOSEN, REJECTED), **config)
def close(a, b): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)

def nll_of_batch(prompt_too=False):
    "Minus the mean log-probability of the chosen replies' tokens, all tokens of the batch alike; with the prompts' tokens but the first, if asked."
    parts = [token_logps(POLICY, x[:1] if prompt_too else x, x[1:] + y if prompt_too else y) for x, y in zip(PROMPTS, CHOSEN)]
    return -torch.cat(parts).mean()


@pytest.mark.parametrize("beta", [.1, .5])
def test_ipo_is_trl_s_with_averages(beta):
    # items 64, 65
    (c, r), (ref_c, ref_r) = sums(POLICY), sums(REF)
    their_loss = theirs("DPO", loss_type="ipo", beta=beta)
    close(ipo_loss(c/LEN_C, r/LEN_R, ref_c/LEN_C, ref_r/LEN_R, beta), their_loss)
    assert (ipo_loss(c, r, ref_c, ref_r, beta) - their_loss).abs() > .1  # the paper's sums are another loss


def test_ipo_at_step_0():
    # items 64, 65
    close(trl_loss("DPO", REF, REF, PROMPTS, (CHOSEN, REJECTED), loss_type="ipo", beta=.1), torch.tensor(25.))


def test_trl_s_hinge_has_a_reference_and_slic_has_none():
    # item 66
    (c, r), (ref_c, ref_r) = sums(POLICY), sums(REF)
    beta, their_loss = .5, theirs("DPO", loss_type="hinge", beta=.5)
    close((1 - beta*((c - ref_c) - (r - ref_r))).clamp(min=0).mean(), their_loss)
    ours = slic_loss(c, r, torch.tensor(0.), margin=1., lam=0.)
    assert (ours - their_loss).abs() > .1
    close(trl_loss("DPO", POLICY, POLICY, PROMPTS, (CHOSEN, REJECTED), loss_type="hinge", beta=.5), torch.tensor(1.))  # step 0, whatever the pairs are


def test_cpo_s_hinge_is_slic():
    # item 66: max(0, 1 - beta*gap) is beta times SLiC with the margin 1/beta
    c, r = sums(POLICY)
    for alpha in (0., .5): close(.2*slic_loss(c, r, nll_of_batch(), margin=5., lam=alpha/.2), theirs("CPO", loss_type="hinge", beta=.2, cpo_alpha=alpha))


@pytest.mark.parametrize("alpha", [0., 1., .3])
def test_cpo(alpha):
    # item 68
    c, r = sums(POLICY)
    close(cpo_loss(c, r, nll_of_batch(), beta=.2, alpha=alpha), theirs("CPO", loss_type="sigmoid", beta=.2, cpo_alpha=alpha))


def test_our_nll_weighs_replies_and_trl_s_weighs_tokens():
    # item 68: the one difference left to CPOTrainer, when each reply's own nll is given
    c, r = sums(POLICY)
    each = -torch.stack([token_logps(POLICY, x, y).mean() for x, y in zip(PROMPTS, CHOSEN)])
    ours = cpo_loss(c, r, each, beta=.2, alpha=1.)
    close(ours - theirs("CPO", loss_type="sigmoid", beta=.2, cpo_alpha=1.), each.mean() - (each*LEN_C).sum()/LEN_C.sum())


def test_cpo_s_ipo_is_ipo_without_a_reference():
    # item 64
    c, r = sums(POLICY)
    zero = torch.zeros(3)
    close(ipo_loss(c/LEN_C, r/LEN_R, zero, zero, tau=.2), theirs("CPO", loss_type="ipo", beta=.2, cpo_alpha=0.))


@pytest.mark.parametrize("alpha", [0., .5])
def test_simpo_and_cpo_simpo(alpha):
    # item 72: TRL's simpo_gamma is beta*gamma_ratio
    c, r = sums(POLICY)
    ours = simpo_loss(c, r, LEN_C, LEN_R, beta=2., gamma_ratio=.3) + alpha*nll_of_batch()
    close(ours, theirs("CPO", loss_type="simpo", beta=2., simpo_gamma=.6, cpo_alpha=alpha))


@pytest.mark.parametrize("lam", [.1, 1.])
def test_orpo_and_the_prompt_in_its_nll(lam):
    # item 67
    c, r = sums(POLICY)
    their_loss = theirs("ORPO", beta=lam)
    close(orpo_loss(c/LEN_C, r/LEN_R, nll_of_batch(prompt_too=True), lam), their_loss)
    close(their_loss - orpo_loss(c/LEN_C, r/LEN_R, nll_of_batch(), lam), nll_of_batch(prompt_too=True) - nll_of_batch())
    assert (nll_of_batch(prompt_too=True) - nll_of_batch()).abs() > .01
