"""The DPO family: each loss against numbers by hand, enumerated optima, finite differences; what happens at the edges."""
import math
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import gradcheck

from ftcourse.align.dpo import dpo_loss, fit_policy
from ftcourse.align.prefer import pair_fields, prefer
from ftcourse.align.zoo import _log1mexp, cpo_loss, ipo_loss, orpo_loss, rdpo_loss, rrhf_loss, slic_loss

NAN, F64 = float("nan"), torch.float64
HALF, FIFTH, ZERO = (torch.tensor([x], dtype=F64) for x in (math.log(.5), math.log(.2), 0.))
ALL = {"ipo": (ipo_loss, 4), "slic": (slic_loss, 3), "cpo": (cpo_loss, 3), "orpo": (orpo_loss, 3), "rdpo": (rdpo_loss, 6)}  # loss, number of (B,) tensors


def row(*numbers, grad=False): return torch.tensor(numbers, dtype=F64, requires_grad=grad)
def close(got, expected, tolerance=1e-12): torch.testing.assert_close(torch.as_tensor(got).detach().double(), torch.as_tensor(expected, dtype=F64), atol=tolerance, rtol=0)
def kl(p, q): return (p.exp()*(p - q)).sum().item()


class World:
    "N replies, a reference, a distribution that pairs are drawn from, and how often people prefer one reply to another."
    def __init__(self, seed, N=5, reward=None, uniform=False):
        gen = torch.Generator().manual_seed(seed)
        def draw(): return torch.randn(N, generator=gen, dtype=F64)
        self.N, self.ref, self.mu = N, draw().log_softmax(-1), (draw()*(not uniform)).softmax(-1)
        self.lengths = torch.randint(1, 9, (N,), generator=gen).double()
        upper = torch.rand(N, N, generator=gen, dtype=F64).triu(1)
        self.p = upper + (1 - upper).T.tril(-1) + torch.eye(N, dtype=F64)/2 if reward is None else (reward[:, None] - reward[None]).sigmoid()
        self.i, self.j = torch.cartesian_prod(torch.arange(N), torch.arange(N)).T
        self.weights = self.mu[self.i]*self.mu[self.j]*self.p[self.i, self.j]*2

    def pairs(self, x): return x[self.i], x[self.j]
    def fit(self, loss): return fit_policy(lambda logps: (self.weights*loss(logps)).sum(), self.N, steps=500)


# --- IPO ---------------------------------------------------------------------------------------------------------------
def test_ipo_by_hand():
    # item 64
    close(ipo_loss(row(-3.2), row(-5.2), row(-4), row(-5), tau=.25), 1.)  # gap 1, to reach 2
    close(ipo_loss(row(-1), row(-9), row(-2), row(-5), tau=.1), 0.)  # gap 5, to reach 5
    close(ipo_loss(row(-5), row(-9), row(-2), row(-5), tau=.5), 0.)  # gap -3 + 4
    close(ipo_loss(row(0), row(0), row(-3), row(0), tau=.5), 4.)  # gap 3, to reach 1: too large counts too
    for tau in (.01, .1, .5, 1., 3.): close(ipo_loss(row(-7, -40), row(-2, -3), row(-7, -40), row(-2, -3), tau), 1/(4*tau**2), 1e-9)  # step 0


def test_ipo_pulls_back_beyond_its_margin():
    # item 64
    chosen = row(3., 9., grad=True)
    grad, = torch.autograd.grad(ipo_loss(chosen, row(0, 0), row(0, 0), row(0, 0), tau=.1, reduction="none").sum(), chosen)
    close(grad, row(-4., 8.))  # to reach 5


@pytest.mark.parametrize("seed, uniform", [(0, False), (1, False), (2, True)])
@pytest.mark.parametrize("tau", [.1, .5])
def test_ipo_reaches_the_paper_s_optimum(seed, uniform, tau):
    # item 64: preferences that no reward explains, pairs from any mu
    w = World(seed, uniform=uniform)
    (ref_c, ref_r), wins = w.pairs(w.ref), w.p @ w.mu
    fitted = w.fit(lambda logps: ipo_loss(*w.pairs(logps), ref_c, ref_r, tau, reduction="none"))
    weights = w.ref.exp()*(wins/tau).exp()
    assert abs(kl(fitted, (weights/weights.sum()).log())) < 1e-8 < 1e-3 < kl(w.ref, fitted)


def test_ipo_s_optimum_depends_on_where_pairs_come_from():
    # item 64: with a reward behind the labels, DPO's optimum doesn't
    reward = row(0, 1, -1, 2, .5)
    a, b = World(0, reward=reward), World(0, reward=reward, uniform=True)
    def best(w, loss, **kw): return w.fit(lambda logps: loss(*w.pairs(logps), *w.pairs(w.ref), reduction="none", **kw))
    assert kl(best(a, ipo_loss, tau=.2), best(b, ipo_loss, tau=.2)) > 1e-3
    assert abs(kl(best(a, dpo_loss, beta=.5), best(b, dpo_loss, beta=.5))) < 1e-8


def test_ipo_with_averages_has_another_optimum():
    # item 64: log-ratio = length*(wins/tau + k), with k such that the probabilities sum to 1
    w, tau = World(3), .5
    (len_c, len_r), (ref_c, ref_r), wins = w.pairs(w.lengths), w.pairs(w.ref), w.p @ w.mu
    def loss(logps):
        c, r = w.pairs(logps)
        return ipo_loss(c/len_c, r/len_r, ref_c/len_c, ref_r/len_r, tau, reduction="none")
    log_ratios = w.fit(loss) - w.ref
    constants = log_ratios/w.lengths - wins/tau
    close(constants, constants[0].expand(w.N), 1e-5)
    weights = w.ref.exp()*(wins/tau).exp()
    assert abs(kl(log_ratios + w.ref, (weights/weights.sum()).log())) > 1e-2


def test_ipo_stops_where_dpo_does_not():
    # item 64: two replies, one always preferred; IPO's gap is 1/(2 tau)
    def gap(loss, **kw): return fit_policy(lambda l: loss(l[:1], l[1:], ZERO, ZERO, **kw), 2).diff().neg().item()
    assert gap(ipo_loss, tau=.1) == pytest.approx(5, abs=1e-6)
    assert gap(dpo_loss, beta=1.) > 12


def test_lengths_are_counted_by_the_mask():
    # item 65: two replies of 3 and 2 tokens, one token-level log-ratio of which is 0 by chance; at step 0 all are
    mask = torch.tensor([[1., 1, 1, 0], [1, 1, 0, 0]], dtype=F64)
    ratios = torch.tensor([[.6, 0, .3, 9], [-.4, .2, 9, 9]], dtype=F64)
    mean = (ratios*mask).sum(-1)/mask.sum(-1)
    close(mean, row(.3, -.1))
    close(ipo_loss(mean[:1], mean[1:], ZERO, ZERO, tau=1.), .01)  # (.4 - .5)²; by non-zeros (.45 + .1 - .5)²
    step_0 = torch.zeros_like(ratios)
    mean = (step_0*mask).sum(-1)/mask.sum(-1)
    close(ipo_loss(mean[:1], mean[1:], ZERO, ZERO, tau=1.), .25)
    assert ((step_0*mask).sum(-1)/(step_0 != 0).sum(-1)).isnan().all()


def test_prefer_s_means_are_by_the_mask():
    # item 65: a token that is certain has log-probability 0 and counts; a reply of nothing else has the mean 0
    class Batch(SimpleNamespace):
        def __len__(self): return 1
    token_logps, mask = torch.tensor([[-3., 0, -3, 0], [0, 0, 0, 0]]), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    fields = pair_fields(token_logps, mask, Batch(scores=torch.tensor([1., 0.]), n_replies=[2], ref_logps=token_logps.sum(1)))
    close(fields["chosen_mean_logps"], row(-2)), close(fields["rejected_mean_logps"], row(0)), close(fields["nll"], row(2))
    close(ipo_loss(*(fields[f"{ref}{side}_logps"]/fields[f"{side}_len"] for ref in ("", "ref_") for side in ("chosen", "rejected"))), 25., 1e-5)


def test_prefer_s_first_step():
    # items 64, 69: policy and reference agree, so the loss is 1/(4 tau²), or what the lengths alone make of it
    pair = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " five, no six"}
    def first(objective): return prefer("tiny", [pair]*4, objective=objective, batch_size=4, max_steps=1, progress=False).history[0]
    assert first("ipo")["loss"] == pytest.approx(25, abs=1e-3)
    h = first("rdpo")
    assert h["rejected_len"] > h["chosen_len"]
    assert h["loss"] == pytest.approx(math.log(1 + math.exp(.01*(h["rejected_len"] - h["chosen_len"]))), abs=1e-4)


# --- SLiC, CPO ---------------------------------------------------------------------------------------------------------
def test_slic_by_hand():
    # item 66
    losses = slic_loss(row(-2, -2, -5), row(-2.5, -5, -3), row(.7, .7, .7), margin=1., lam=2., reduction="none")
    close(losses, row(.5 + 1.4, 1.4, 3 + 1.4))
    close(slic_loss(row(-2, -2), row(-2, -2), row(0, 0), margin=.3), .3)
    close(slic_loss(row(-2), row(-2.5), row(.7), lam=0.), .5)


def test_slic_leaves_a_won_pair_alone():
    # item 66
    c, r, nll = row(-2, -2, -2, grad=True), row(-3.01, -2.99, -50, grad=True), row(1, 1, 1, grad=True)
    slic_loss(c, r, nll, margin=1., lam=.5, reduction="none").sum().backward()
    close(c.grad, row(0, -1, 0)), close(r.grad, row(0, 1, 0)), close(nll.grad, row(.5, .5, .5))


def test_slic_sees_only_the_difference():
    # item 66: no reference, so what both replies share doesn't matter
    close(slic_loss(HALF, FIFTH, ZERO), slic_loss(HALF - 9, FIFTH - 9, ZERO)), close(slic_loss(HALF, FIFTH, ZERO), 1 - math.log(2.5))


def test_cpo_is_dpo_under_a_uniform_reference():
    # item 68
    gen = torch.Generator().manual_seed(0)
    c, r, nll = (-30*torch.rand(6, generator=gen, dtype=F64) for _ in range(3))
    for beta in (.1, 1.):
        for u in (0., -17.): close(cpo_loss(c, r, nll, beta, alpha=0.), dpo_loss(c, r, torch.full_like(c, u), torch.full_like(c, u), beta))
        close(cpo_loss(c, r, -nll, beta, alpha=.7) - cpo_loss(c, r, -nll, beta, alpha=0.), .7*-nll.mean())


def test_cpo_by_hand():
    # item 68: sigma = (1/2)/(1/2 + 1/5) = 5/7
    close(cpo_loss(HALF, FIFTH, ZERO, beta=1.), math.log(1.4))
    close(cpo_loss(FIFTH, HALF, ZERO, beta=1.), math.log(3.5))
    close(cpo_loss(HALF, FIFTH, row(.3), beta=1., alpha=2.), math.log(1.4) + .6)
    close(cpo_loss(HALF, FIFTH, row(.3), beta=1., alpha=0.), math.log(1.4))


# --- ORPO --------------------------------------------------------------------------------------------------------------
def test_orpo_by_hand():
    # item 67: odds 1 and 1/4
    close(orpo_loss(HALF, FIFTH, row(.3), lam=1.), math.log(1.25) + .3)
    close(orpo_loss(FIFTH, HALF, row(.3), lam=2.), 2*math.log(5) + .3)
    close(orpo_loss(HALF, HALF, row(.3), lam=.5), .5*math.log(2) + .3)
    close(orpo_loss(HALF, FIFTH, row(.3), lam=0.), .3)


def test_log1mexp_against_many_digits():
    # item 67: decimal arithmetic of 60 digits
    from decimal import Decimal, getcontext
    getcontext().prec = 60
    for dtype, tolerance in ((torch.float32, 5e-7), (F64, 1e-15)):
        for x in (-1e-20, -1e-7, -1e-3, -.3, -math.log(2), -.7, -3., -20., -80.):
            x = torch.tensor(x, dtype=dtype)
            expected = float((1 - Decimal(x.item()).exp()).ln())
            assert _log1mexp(x).item() == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_orpo_at_certainty(dtype):
    # item 67: every pair of these is finite, with a finite gradient
    values = torch.tensor([0., -1e-30, -1e-9, -1e-6, -1e-3, -.7, -30., -1000.])
    c, r = (x.flatten().to(dtype).requires_grad_() for x in torch.meshgrid(values, values, indexing="ij"))
    losses = orpo_loss(c, r, torch.zeros(64), lam=1., reduction="none")
    losses.sum().backward()
    assert losses.dtype == (F64 if dtype == F64 else torch.float32) and losses.isfinite().all() and c.grad.isfinite().all() and r.grad.isfinite().all()
    assert (c.grad <= 0).all() and (r.grad >= 0).all()


def test_orpo_computes_in_float32():
    # item 67: probabilities of .999 and .998 a token, which bfloat16 cannot tell from each other in p
    c, r = torch.tensor([math.log(.999)]), torch.tensor([math.log(.998)])
    assert orpo_loss(c, r, torch.zeros(1), lam=1.).item() == pytest.approx(math.log(1 + (.998/.002)/(.999/.001)), rel=1e-4)
    halved = orpo_loss(c.bfloat16(), r.bfloat16(), torch.zeros(1), lam=1.).item()
    p, q = c.bfloat16().double().exp().item(), r.bfloat16().double().exp().item()
    assert halved == pytest.approx(math.log(1 + q/(1 - q)*(1 - p)/p), rel=1e-5)


# --- R-DPO -------------------------------------------------------------------------------------------------------------
def test_rdpo_by_hand():
    # item 69: 30 and 10 tokens at .1 each: 2 goes into the sigmoid
    zeros, long, short = [ZERO]*4, row(30), row(10)
    close(rdpo_loss(*zeros, long, short, alpha=.1), math.log(1 + math.exp(-2)))
    close(rdpo_loss(*zeros, short, long, alpha=.1), math.log(1 + math.exp(2)))
    close(rdpo_loss(row(4), row(0), ZERO, ZERO, row(7), row(3), beta=.5, alpha=.25), math.log(1 + math.exp(-3)))
    close(rdpo_loss(*zeros, torch.tensor([30]), torch.tensor([10]), alpha=.1), math.log(1 + math.exp(-2)), 1e-7)  # whole numbers


def test_rdpo_without_a_price_is_dpo():
    # item 69
    gen = torch.Generator().manual_seed(0)
    four = [-30*torch.rand(6, generator=gen, dtype=F64) for _ in range(4)]
    close(rdpo_loss(*four, torch.arange(6.), torch.ones(6), beta=.3, alpha=0.), dpo_loss(*four, beta=.3))


@pytest.mark.parametrize("alpha", [0., .1, -.1])
def test_rdpo_reaches_the_priced_optimum(alpha):
    # item 69: the reward that the labels come from, less alpha a token: a longer reply becomes less likely, not more
    reward, beta = row(0, .8, .4, 1.2, 1.), .5
    w = World(4, reward=reward)
    fitted = w.fit(lambda logps: rdpo_loss(*w.pairs(logps), *w.pairs(w.ref), *w.pairs(w.lengths), beta, alpha, reduction="none"))
    weights = w.ref.exp()*((reward - alpha*w.lengths)/beta).exp()
    assert abs(kl(fitted, (weights/weights.sum()).log())) < 1e-8


def test_dpo_under_a_reference_of_uniform_tokens_is_rdpo():
    # item 69: log V a token
    c, r, long, short = row(-9, -3), row(-2, -8), row(30, 4), row(10, 6)
    V = 11
    close(dpo_loss(c, r, -long*math.log(V), -short*math.log(V), beta=.2), rdpo_loss(c, r, row(0, 0), row(0, 0), long, short, beta=.2, alpha=.2*math.log(V)))


# --- RRHF --------------------------------------------------------------------------------------------------------------
def test_rrhf_by_hand():
    # item 70: 1 below 2 by .5 and below 3 by .2
    p = torch.tensor([[-1., -.5, -.8]], dtype=F64, requires_grad=True)
    loss = rrhf_loss(p, row(3, 2, 1)[None], row(1.))
    loss.backward()
    close(loss, 1.7), close(p.grad, row(-2, 1, 1)[None])
    close(rrhf_loss(p, row(1, 2, 3)[None], row(.8)), .3 + .8)  # only 2 above 3 is wrong
    close(rrhf_loss(p, row(2, 2, 2)[None], row(.25)), .25)  # ties are no pairs
    close(rrhf_loss(p, row(30, .2, -10)[None], row(1.)), 1.7)  # only the order counts


def test_rrhf_by_counting_all_pairs():
    # item 70
    gen = torch.Generator().manual_seed(0)
    p, scores = -3*torch.rand(4, 6, generator=gen, dtype=F64), torch.randint(4, (4, 6), generator=gen).double()
    scores[torch.rand(4, 6, generator=gen) < .3] = NAN
    expected = [sum(max(0., (p[b, i] - p[b, j]).item()) for i in range(6) for j in range(6) if scores[b, i] < scores[b, j]) for b in range(4)]
    close(rrhf_loss(p, scores, torch.zeros(4, dtype=F64), reduction="none"), row(*expected))
    order = torch.randperm(6, generator=gen)
    close(rrhf_loss(p[:, order], scores[:, order], ZERO[0]), rrhf_loss(p, scores, ZERO[0]))


def test_rrhf_s_empty_places_reach_nothing():
    # item 70: a NaN score, whatever stands in mean_logps there
    for junk in (NAN, 0., -math.inf, 5.):
        p = torch.tensor([[-1., junk, -.5, junk], [-2., -1., junk, junk]], dtype=F64, requires_grad=True)
        scores = torch.tensor([[2., NAN, 1., NAN], [1., 2., NAN, NAN]], dtype=F64)
        loss = rrhf_loss(p, scores, row(1., 1.))
        loss.backward()
        close(loss, 1.25), close(p.grad, torch.tensor([[-.5, 0, .5, 0], [0, 0, 0, 0]], dtype=F64))


def test_rrhf_learns_only_the_best():
    # item 70
    p, nll = torch.full((1, 3), -1., dtype=F64, requires_grad=True), row(1., grad=True)
    rrhf_loss(p, row(3, 2, 1)[None], nll).backward()
    close(p.grad, row(0, 0, 0)[None]), close(nll.grad, row(1.))


# --- all of them -------------------------------------------------------------------------------------------------------
def inputs(name, n, seed=0):
    gen = torch.Generator().manual_seed(seed)
    draw = [-3*torch.rand(7, generator=gen, dtype=F64) - .01 for _ in range(n)]
    if name == "rdpo": draw[4:] = [x.mul(-9).round() for x in draw[4:]]
    return draw


@pytest.mark.parametrize("name", ALL)
def test_gradients_by_finite_differences(name):
    # items 64, 66-69
    loss, n = ALL[name]
    for seed in range(3): assert gradcheck(loss, [x.requires_grad_() for x in inputs(name, n, seed)], eps=1e-7, atol=1e-5)


def test_rrhf_gradient_by_finite_differences():
    # item 70
    gen = torch.Generator().manual_seed(0)
    p = (-3*torch.rand(3, 4, generator=gen, dtype=F64)).requires_grad_()
    scores = torch.tensor([[1., 2, 3, 4], [4, NAN, 2, 2], [NAN, NAN, 1, 0]])
    assert gradcheck(lambda p, nll: rrhf_loss(p, scores, nll), [p, row(1, 2, 3, grad=True)], eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_reductions_and_types(name):
    loss, n = ALL[name]
    tensors = inputs(name, n)
    each = loss(*tensors, reduction="none")
    assert each.shape == (7,) and each.dtype == F64
    close(loss(*tensors), each.mean())
    assert loss(*(t.bfloat16() for t in tensors)).dtype == torch.float32
    order = torch.randperm(7)
    close(loss(*(t[order] for t in tensors), reduction="none"), each[order])
    with pytest.raises(ValueError, match="sum"): loss(*tensors, reduction="sum")


@pytest.mark.parametrize("name", ["slic", "cpo", "orpo"])
def test_one_nll_for_all_or_one_each(name):
    loss, _ = ALL[name]
    c, r, nll = inputs(name, 3)
    close(loss(c, r, nll.mean()), loss(c, r, nll))


@pytest.mark.parametrize("name", [*ALL, "rrhf"])
def test_shapes_that_do_not_fit_are_refused(name):
    loss, n = ALL.get(name, (rrhf_loss, 3))
    tensors = [torch.ones(4) for _ in range(n)]
    tensors[1] = torch.ones(4, 1)
    with pytest.raises(ValueError, match="shapes"): loss(*tensors)


@pytest.mark.parametrize("loss", [slic_loss, cpo_loss, orpo_loss])
def test_an_nll_in_a_column_is_refused(loss):
    with pytest.raises(ValueError, match="shapes"): loss(torch.zeros(4), torch.zeros(4), torch.zeros(4, 1))
    with pytest.raises(ValueError, match="rrhf_loss.*shapes"): rrhf_loss(torch.zeros(4, 2), torch.zeros(4, 2), torch.zeros(4, 1))


def test_values_that_cannot_work():
    four = [torch.zeros(2)]*4
    for tau in (0, -.1):
        with pytest.raises(ValueError, match="tau"): ipo_loss(*four, tau=tau)
    with pytest.raises(ValueError, match="beta"): rdpo_loss(*four, torch.ones(2), torch.ones(2), beta=0)
    with pytest.raises(ValueError, match="beta"): cpo_loss(*four[:3], beta=0)
