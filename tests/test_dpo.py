"""DPO: numbers by hand, its gradient by differences, its optimum by enumeration, and TRL's own trainer."""
import itertools, math

import pytest
import torch
from torch.testing import assert_close
from trl_stub import random_table, reply_sums, trl_loss

from ftcourse.align.dpo import as_float32, check_shapes, dpo_loss, dpo_margins, fit_policy, implicit_reward, optimal_policy, reduced, robust_dpo_loss

N = 4 + 16  # all replies of one or two tokens over a vocabulary of four


def draw(*shape, seed=0, dtype=torch.float64): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
def tensors(*numbers, dtype=torch.float64): return [torch.tensor([x], dtype=dtype) for x in numbers]
def with_margin(m): return tensors(m, 0., 0., 0.)  # at beta=1
def kl(p, q): return (p.exp()*(p - q)).sum().item()


# --- values and gradients by hand ------------------------------------------------------------------------------------
def test_at_step_0_the_loss_is_ln_2_and_rewards_are_0():
    # item 57
    chosen, rejected = -50*draw(6).abs(), -300*draw(6, seed=1).abs()
    for beta in (.01, .1, 5.):
        for loss in (dpo_loss(chosen, rejected, chosen, rejected, beta), robust_dpo_loss(chosen, rejected, chosen, rejected, beta, .2), dpo_loss(chosen, rejected, chosen, rejected, beta, .2)):
            assert loss.item() == pytest.approx(math.log(2), abs=1e-15)
        assert dpo_margins(chosen, rejected, chosen, rejected, beta).eq(0).all()
        assert implicit_reward(chosen, chosen, beta).eq(0).all()


def test_margin_by_hand():
    # item 57: -12 -> -10 is up 2 nats, -8 -> -9 is down 1; and what the reference found likely is no merit of the policy
    assert dpo_margins(*tensors(-10., -9., -12., -8.), beta=.1).item() == pytest.approx(.3, abs=1e-12)
    assert dpo_margins(*tensors(-10., -9., -10., -9.), beta=.1).item() == 0
    # a probability of 4/5 for the right order costs ln 5/4, one of 1/5 costs ln 5
    assert dpo_loss(*with_margin(math.log(4)), beta=1.).item() == pytest.approx(math.log(5/4), abs=1e-12)
    assert dpo_loss(*with_margin(-math.log(4)), beta=1.).item() == pytest.approx(math.log(5), abs=1e-12)
    assert dpo_loss(*with_margin(10*math.log(4))).item() == pytest.approx(math.log(5/4), abs=1e-12)  # beta is 0.1 unless said


def test_gradient_raises_chosen_and_lowers_rejected():
    # item 58: minus and plus beta*sigmoid(-margin), nothing for the reference's side of it beyond the sign
    points = [p.requires_grad_() for p in (draw(5), draw(5, seed=1), draw(5, seed=2), draw(5, seed=3))]
    for beta in (.1, 2.):
        grads = torch.autograd.grad(dpo_loss(*points, beta=beta, reduction="none").sum(), points)
        for b in range(5):
            c, r, rc, rr = (p[b].item() for p in points)
            weight = beta/(1 + math.exp(beta*((c - rc) - (r - rr))))
            assert [g[b].item() for g in grads] == pytest.approx([-weight, weight, weight, -weight], rel=1e-9)
    assert torch.autograd.gradcheck(lambda *p: dpo_loss(*p, beta=.7, label_smoothing=.2), points)
    assert torch.autograd.gradcheck(lambda *p: robust_dpo_loss(*p, beta=.7, label_smoothing=.2), points)


def test_implicit_reward_has_beta_and_no_gradient():
    # item 59
    logps = torch.tensor([-10., -7.], requires_grad=True)
    reward = implicit_reward(logps, torch.tensor([-12., -2.], requires_grad=True), beta=.1)
    assert_close(reward, torch.tensor([.2, -.5]))
    assert not reward.requires_grad


def test_conservative_and_robust():
    # item 60
    right, wrong = -math.log(.8), -math.log(.2)
    four = with_margin(math.log(4))
    assert dpo_loss(*four, 1., .1).item() == pytest.approx(.9*right + .1*wrong, abs=1e-12)
    assert robust_dpo_loss(*four, 1., .1).item() == pytest.approx((.9*right - .1*wrong)/.8, abs=1e-12)
    assert robust_dpo_loss(*four, 1., 0.).item() == dpo_loss(*four, 1., 0.).item() == pytest.approx(right, abs=1e-12)


def test_robust_is_unbiased_under_flips_and_conservative_rests_at_the_right_odds():
    # item 60: E over a label that flips with probability eps of the robust loss is DPO's of the true label
    for eps, m in itertools.product((.05, .3, .45), (-3., .2, 8.)):
        mean = (1 - eps)*robust_dpo_loss(*with_margin(m), 1., eps) + eps*robust_dpo_loss(*with_margin(-m), 1., eps)
        assert mean.item() == pytest.approx(math.log1p(math.exp(-m)), rel=1e-9)
        rest = [p.requires_grad_() for p in with_margin(math.log((1 - eps)/eps))]
        dpo_loss(*rest, 1., eps).backward()
        assert rest[0].grad.abs().item() < 1e-12


# --- the optimum, by enumeration -------------------------------------------------------------------------------------
REWARDS, REF = 2*draw(N), draw(N, seed=1).log_softmax(-1)
I, J = torch.tensor(list(itertools.permutations(range(N), 2))).T

def pairs_loss(logps, beta, weights, eps=0.): return (weights*dpo_loss(logps[I], logps[J], REF[I], REF[J], beta, eps, reduction="none")).sum()/weights.sum()


@pytest.mark.parametrize("beta", [.05, .3, 1., 10.])
def test_bradley_terry_pairs_lead_to_the_optimum(beta):
    # item 58: pi* = pi_ref exp(r/beta)/Z, written out here
    best = REF.exp()*(REWARDS/beta).exp()
    best = (best/best.sum()).log()
    fitted = fit_policy(lambda logps: pairs_loss(logps, beta, 1/(1 + (REWARDS[J] - REWARDS[I]).exp())), N, steps=500)
    assert kl(best, fitted) < 1e-6 and kl(fitted, best) < 1e-6
    assert_close(optimal_policy(REF, REWARDS, beta), best)
    rewards = implicit_reward(fitted, REF, beta)
    assert_close(rewards - rewards.mean(), REWARDS - REWARDS.mean(), atol=1e-4, rtol=0)  # up to one constant


def test_optimal_policy_beats_every_other():
    def objective(p, beta): return (p.exp()*(REWARDS - beta*(p - REF))).sum().item()
    for beta in (.2, 3.):
        best = optimal_policy(REF, REWARDS, beta)
        assert best.exp().sum().item() == pytest.approx(1, abs=1e-12)
        for seed in range(20): assert objective((best + .3*draw(N, seed=seed)).log_softmax(-1), beta) < objective(best, beta)
        assert_close(optimal_policy(REF, REWARDS + 7, beta), best)
    assert kl(optimal_policy(REF, REWARDS, 1e6), REF) < 1e-9
    assert optimal_policy(REF, REWARDS, 1e-3).argmax() == REWARDS.argmax()


def test_hard_labels_have_no_optimum():
    hard = (REWARDS[I] > REWARDS[J]).double()
    runs = [fit_policy(lambda logps: pairs_loss(logps, .5, hard), N, steps=n) for n in (5, 10, 20, 40)]
    spreads, losses = [(p.max() - p.min()).item() for p in runs], [pairs_loss(p, .5, hard).item() for p in runs]
    assert spreads == sorted(spreads) and spreads[-1] > 100 and losses == sorted(losses, reverse=True) and losses[-1] < 1e-3
    assert runs[-1].argmax() == REWARDS.argmax() and runs[-1].exp().max() > .999
    a, b = (fit_policy(lambda logps: pairs_loss(logps, .5, hard, .1), N, steps=n) for n in (200, 400))  # label smoothing holds it
    assert (a.max() - a.min()).item() < 60
    assert_close(a, b, atol=1e-5, rtol=0)


def test_chosen_may_fall_while_the_margin_rises():
    # item 63: logits theta*(1, 2, 0) for chosen, rejected and a reply outside the pair; DPO's step lowers theta
    def logps(theta): return (theta*torch.tensor([1., 2., 0.], dtype=torch.float64)).log_softmax(-1)
    theta, ref, seen = torch.zeros((), dtype=torch.float64), logps(0.), []
    for _ in range(20):
        theta = theta.detach().requires_grad_()
        p = logps(theta)
        seen.append(p.detach())
        theta = theta - .5*torch.autograd.grad(dpo_loss(p[:1], p[1:2], ref[:1], ref[1:2], beta=1.), theta)[0]
    chosen, rejected, other = torch.stack(seen).T
    assert (chosen.diff() < 0).all() and ((chosen - rejected).diff() > 0).all() and (other.diff() > 0).all()


def test_fit_policy():
    for seed in range(3):
        target = 3*draw(7, seed=seed).log_softmax(-1)
        target = target.log_softmax(-1)
        found = fit_policy(lambda logps: -(target.exp()*logps).sum(), 7, start=draw(7, seed=9) if seed else None)
        assert found.dtype == torch.float64 and not found.requires_grad
        assert_close(found, target, atol=1e-5, rtol=0)


# --- shapes, precision, refusals ---------------------------------------------------------------------------------------
def test_reductions_and_batch_order():
    numbers = [draw(8, seed=s) for s in range(4)]
    for f in (dpo_loss, robust_dpo_loss):
        losses = f(*numbers, label_smoothing=.1, reduction="none")
        assert losses.shape == (8,)
        assert f(*numbers, label_smoothing=.1).item() == pytest.approx(sum(losses.tolist())/8)
        assert_close(f(*(x.flip(0) for x in numbers), label_smoothing=.1, reduction="none"), losses.flip(0))
    assert reduced(torch.tensor([1., 2.]), "none").tolist() == [1, 2]


def test_computed_in_float32():
    # logits of 16 bits: the margin of two replies near -300 nats must not be rounded to a multiple of 2 once more
    chosen, rejected = tensors(-301., -299.25, dtype=torch.float32)
    half = [x.bfloat16() for x in (chosen, rejected, rejected*0, rejected*0)]
    assert dpo_margins(*half, beta=.1).dtype == torch.float32
    assert dpo_margins(*half, beta=.1).item() == pytest.approx(.1*(half[0].float() - half[1].float()).item(), abs=1e-6)
    assert [x.dtype for x in as_float32(*half, draw(1))] == [torch.float32]*4 + [torch.float64]
    assert dpo_loss(*with_margin(2e4), 1.).item() == 0 and dpo_loss(*with_margin(-2e4), 1.).item() == 2e4  # no inf, no NaN


@pytest.mark.parametrize("bad,match", [(dict(beta=0.), "beta=0.0"), (dict(beta=-1), "beta=-1"), (dict(label_smoothing=.5), "label_smoothing=0.5"), (dict(label_smoothing=-.1), "label_smoothing=-0.1"),
                                       (dict(reduction="sum"), "'mean' and 'none'")])
def test_options_that_cannot_be(bad, match):
    for f in (dpo_loss, robust_dpo_loss):
        with pytest.raises(ValueError, match=match): f(*with_margin(1.), **bad)


def test_shapes_that_cannot_be():
    for bad in (torch.zeros(3, 1), torch.zeros(2), torch.zeros(())):
        for place in range(4):
            numbers = [torch.zeros(3)]*4
            numbers[place] = bad
            with pytest.raises(ValueError, match="shapes"): dpo_loss(*numbers)
    with pytest.raises(ValueError, match="shapes"): implicit_reward(torch.zeros(3), torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"name.*\(2,\).*\(3,\)"): check_shapes("name", torch.zeros(2), torch.zeros(3))


# --- TRL ------------------------------------------------------------------------------------------------------------------
PROMPTS, CHOSEN, REJECTED = [[1, 2], [3], [4, 5, 6]], [[1, 2, 3], [4], [5, 6]], [[7, 8], [9, 10, 11, 12], [1]]

@pytest.mark.slow
@pytest.mark.parametrize("beta", [.1, 1.])
@pytest.mark.parametrize("options,ours", [
    (dict(loss_type="sigmoid"), dpo_loss), (dict(loss_type="robust", label_smoothing=.2), lambda *x: robust_dpo_loss(*x, label_smoothing=.2)),
    (dict(loss_type="sigmoid", label_smoothing=.2), dpo_loss)])  # TRL 1.16 leaves label_smoothing out of `sigmoid`
def test_trl_s_loss(beta, options, ours):
    # item 57
    # item 60
    pytest.importorskip("trl")
    policy, ref = random_table(0), random_table(1)
    theirs = trl_loss("DPO", policy, ref, PROMPTS, (CHOSEN, REJECTED), beta=beta, **options)
    numbers = [reply_sums(table, PROMPTS, replies) for table in (policy, ref) for replies in (CHOSEN, REJECTED)]
    assert_close(ours(*numbers, beta), theirs, atol=1e-6, rtol=1e-6)
    if options["loss_type"] == "sigmoid": assert trl_loss("DPO", policy, policy, PROMPTS, (CHOSEN, REJECTED), beta=beta).item() == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.slow
def test_trl_s_conservative_loss():
    # item 60: TRL has label smoothing in its CPO trainer, which is DPO with a reference that finds all replies alike
    pytest.importorskip("trl")
    policy = random_table(0)
    theirs = trl_loss("CPO", policy, None, PROMPTS, (CHOSEN, REJECTED), loss_type="sigmoid", cpo_alpha=0., beta=.3, label_smoothing=.2)
    chosen, rejected = (reply_sums(policy, PROMPTS, replies) for replies in (CHOSEN, REJECTED))
    assert_close(dpo_loss(chosen, rejected, 0*chosen, 0*rejected, .3, .2), theirs, atol=1e-6, rtol=1e-6)
