"""KTO: the loss by hand and against TRL, the reference point, who is paired with whom, the weights, and where it ends."""
import copy, itertools, math

import pytest
import torch
from torch.testing import assert_close

from ftcourse.align.dpo import dpo_loss, fit_policy
from ftcourse.align.kto import balanced_weights, check_weights, kto_kl, kto_loss, mismatch
from ftcourse.data.batches import Tree, encode_rows
from ftcourse.models import load
from ftcourse.tune.trees import batch_trees, reply_logps

GOOD, BAD, ZERO = torch.tensor([True]), torch.tensor([False]), torch.zeros(1)


# --- the loss ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("logratio, good, z, beta, weights, expected", [
    (2., True, .5, .5, (1., 1.), .3208213),     # 1 - sigma(.75)
    (-2., False, .5, .5, (1., 1.), .2227001),   # 1 - sigma(1.25)
    (3., False, 1., 1., (1., 1.), .8807971),    # 1 - sigma(-2)
    (-3., True, 1., .1, (1., 1.), .5986877),    # 1 - sigma(-.4)
    (2., True, .5, .5, (3., 7.), .9624639), (-2., False, .5, .5, (3., 7.), 1.5589007)])
def test_loss_by_hand(logratio, good, z, beta, weights, expected):
    # item 76
    loss = kto_loss(torch.tensor([logratio - 20.]), torch.tensor([-20.]), torch.tensor([good]), torch.tensor(z), beta, *weights)
    assert_close(loss, torch.tensor(expected), atol=1e-6, rtol=1e-6)


def test_first_step():
    # item 81
    logps = -torch.rand(5)*300
    good = torch.tensor([True, False, False, True, False])
    losses = kto_loss(logps, logps, good, kto_kl(logps, logps), desirable_weight=1.5, undesirable_weight=.25, reduction="none")
    assert losses.tolist() == [.75, .125, .125, .75, .125]
    assert kto_loss(logps, logps, good, torch.tensor(0.)).item() == .5


@pytest.mark.parametrize("kind", [True, False])
def test_one_kind_alone_is_finite(kind):
    # item 82
    logps = torch.tensor([-5., -900., -1.], requires_grad=True)
    loss = kto_loss(logps, torch.tensor([-900., -5., -1.]), torch.full((3,), kind), torch.tensor(2.))
    loss.backward()
    assert loss.isfinite() and logps.grad.isfinite().all() and logps.grad[2] != 0


def test_no_gradient_through_the_reference_point():
    # item 83
    policy, ref = torch.tensor([4., 1.], requires_grad=True), torch.zeros(2)
    assert not kto_kl(policy, ref).requires_grad
    z = torch.tensor(1., requires_grad=True)
    kto_loss(policy, ref, torch.tensor([True, False]), z + 0*policy.sum()).backward()
    assert z.grad is None
    s = lambda x: 1/(1 + math.exp(-x))
    assert_close(policy.grad, torch.tensor([-.1*s(.3)*s(-.3)/2, .25*.1/2]))


def test_gradient_by_differences():
    # item 76
    gen = torch.Generator().manual_seed(0)
    logps, ref = (torch.randn(4, generator=gen, dtype=torch.float64) for _ in range(2))
    good, z = torch.tensor([True, False, True, False]), torch.tensor(.3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: kto_loss(x, ref, good, z, .7, 2., 3.), logps.requires_grad_())


def test_what_is_refused():
    for change in (dict(desirable=torch.ones(1)), dict(ref_logps=torch.zeros(1, 1)), dict(beta=0.), dict(reduction="sum")):
        with pytest.raises(ValueError): kto_loss(**{**dict(logps=ZERO, ref_logps=ZERO, desirable=GOOD, kl=torch.tensor(0.)), **change})


def test_sixteen_bits_are_lifted():
    logps = torch.tensor([-333.], dtype=torch.bfloat16)
    assert kto_loss(logps, logps, GOOD, torch.tensor(0.)).dtype == kto_kl(logps, logps).dtype == torch.float32


# --- the reference point -----------------------------------------------------------------------------------------
def test_reference_point_is_a_mean_with_a_floor():
    # item 77
    ref = torch.tensor([-10., -10., -10.])
    assert kto_kl(torch.tensor([-9., -12., -6.]), ref).item() == 1.
    assert kto_kl(torch.tensor([-9., -12., -14.]), ref).item() == 0.      # the mean first, then the floor
    assert kto_kl(torch.tensor([-7.]), ref[:1]).item() == 3.
    with pytest.raises(ValueError, match="no mismatched pair"): kto_kl(torch.zeros(0), torch.zeros(0))


def test_mean_log_ratio_is_a_difference_of_two_divergences():
    # E_q[log pi/ref] = KL(q||ref) - KL(q||pi), over all 27 replies of three tokens out of three
    gen = torch.Generator().manual_seed(1)
    pi, ref, q = (torch.randn(27, generator=gen, dtype=torch.float64).log_softmax(-1) for _ in range(3))
    kl = lambda a, b: (a.exp()*(a - b)).sum()
    for p in (q, pi, ref): assert_close((p.exp()*(pi - ref)).sum(), kl(p, ref) - kl(p, pi))
    assert (ref.exp()*(pi - ref)).sum() < 0


# --- who is paired with whom -------------------------------------------------------------------------------------
def _toy(prompts, pairs=False):
    "A tree for each letter; its replies' ids tell the row, 100*row + k."
    return [Tree((1, ord(p)), tuple((100*i + k, 7) for k in range(1 + pairs)), ((1, 1),)*(1 + pairs), i, (1., 0.) if pairs else (float(i % 2),)) for i, p in enumerate(prompts)]

def _sources(mixed): return [divmod(t.replies[-1][0], 100) for t in mixed]   # (row, reply) of the mismatched ones


@pytest.mark.parametrize("prompts", ["ab", "abc", "abcde", "abcdefgh", "aab", "aaab", "aabbcc", "abababa", "aaaaaaab"])
def test_never_its_own_row_nor_its_own_prompt(prompts):
    # item 77, item 78
    trees = _toy(prompts)
    for seed in range(20):
        mixed = mismatch(trees, seed)
        assert all(trees[j].prompt_ids != t.prompt_ids for (j, _), t in zip(_sources(mixed), trees))
        for own, t in zip(trees, mixed):
            assert t.prompt_ids == own.prompt_ids and t.replies[:-1] == own.replies and t.masks[:-1] == own.masks and t.row == own.row
            assert t.scores[:-1] == own.scores and math.isnan(t.scores[-1]) and len(t.replies) == len(t.masks) == len(t.scores) == 2


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 9])
def test_one_circle_where_prompts_differ(n):
    # item 78: a rotation, so each reply is lent once, and the circle has no shorter one in it
    for seed in range(5):
        to = [j for j, _ in _sources(mismatch(_toy([chr(97 + i) for i in range(n)]), seed))]
        walk = list(itertools.accumulate(range(n - 1), lambda i, _: to[i], initial=0))
        assert sorted(walk) == list(range(n))


def test_rotation_and_not_reversal():
    # item 78: twice the partner of an odd circle isn't the row itself, as it is under reversal
    to = [j for j, _ in _sources(mismatch(_toy("abcde")))]
    assert all(to[to[i]] != i for i in range(5))


def test_same_seed_same_pairs():
    # item 85
    trees = _toy("abcdefghij")
    assert _sources(mismatch(trees)) == _sources(mismatch(trees)) and len({tuple(_sources(mismatch(trees, s))) for s in range(10)}) > 5


def test_pairs_lend_both_kinds():
    mixed = mismatch(_toy("abcdefgh", pairs=True))
    assert all(len(t.replies) == 3 and t.scores[:2] == (1., 0.) and math.isnan(t.scores[2]) for t in mixed)
    assert sorted(k for _, k in _sources(mixed)) == [0]*4 + [1]*4


def test_one_prompt_and_unlabelled_rows_are_refused():
    for prompts in ("a", "aaa"):
        with pytest.raises(ValueError, match="same prompt"): mismatch(_toy(prompts))
    with pytest.raises(ValueError, match="row 1 has no labels"): mismatch([*_toy("a"), Tree((2,), ((3,),), ((1,),), 1)])


def test_long_foreign_replies_are_cut():
    trees = [Tree((1,)*5, ((2,),), ((1,),), 0, (1.,)), Tree((3,), ((4, 5, 6, 7),), ((1, 1, 0, 1),), 1, (0.,))]
    mixed = mismatch(trees, max_len=7)
    assert mixed[0].replies[1] == (4, 5) and mixed[0].masks[1] == (1, 1) and mixed[1].replies[1] == (2,)
    assert mismatch(trees)[0].replies[1] == (4, 5, 6, 7)


ROWS = [{"prompt": f"number {i}\n", "completion": w, "label": i % 2 == 0} for i, w in enumerate(("cat", "a dog", "elephant", "mouse", "an owl"))]

def _models():
    "A policy, its reference, and the mismatched trees of five rows."
    ref, tokenizer = load("tiny")
    policy = copy.deepcopy(ref)
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.parameters(): p += .05*torch.randn(p.shape, generator=gen)
    return policy, ref, mismatch(encode_rows(ROWS, tokenizer))

def _logps(model, trees):
    with torch.no_grad(): return reply_logps(model, batch_trees(trees, model))[0].sum(1)


def test_prompts_are_paired_anew_before_the_forward():
    # item 79: the mean of rolled log-ratios is the mean of the matched ones; of mismatched pairs it isn't
    policy, ref, mixed = _models()
    found = {}
    for name, model in (("policy", policy), ("ref", ref)):
        plain = []
        for tree in mixed:
            p, ids = len(tree.prompt_ids), torch.tensor([[*tree.prompt_ids, *tree.replies[1]]])
            with torch.no_grad(): plain.append(model(input_ids=ids).logits[0].float().log_softmax(-1)[p-1:-1].gather(-1, ids[0, p:, None]).sum())
        found[name] = _logps(model, mixed)
        assert_close(found[name][1::2], torch.stack(plain), atol=1e-3, rtol=1e-4)
    own, foreign = ((found["policy"] - found["ref"])[k::2] for k in (0, 1))
    assert_close(own.roll(1).mean(), own.mean())
    assert (own.mean() - foreign.mean()).abs() > .01
    assert_close(kto_kl(found["policy"][1::2], found["ref"][1::2]), foreign.mean().clamp(min=0))


def test_batches_and_accumulation_leave_the_pairs_alone():
    # item 85
    policy, ref, mixed = _models()
    whole = (_logps(policy, mixed) - _logps(ref, mixed))[1::2]
    for size in (1, 2, 3):
        parts = [(_logps(policy, mixed[i:i+size]) - _logps(ref, mixed[i:i+size]))[1::2] for i in range(0, len(mixed), size)]
        assert_close(torch.cat(parts), whole, atol=1e-3, rtol=1e-4)


# --- the weights -------------------------------------------------------------------------------------------------
def test_balance():
    # item 84
    for args, ratio, fine in (((100, 100), 1., True), ((100, 100, 4/3, 1.), 4/3, True), ((100, 100, 1.4, 1.), 1.4, False), ((100, 100, 1., 1.1), 1/1.1, False),
                              ((100, 400), .25, False), ((100, 400, 4., 1.), 1., True), ((400, 100), 4., False), ((400, 100, 1., 3.), 4/3, True)):
        got, warning = check_weights(*args)
        assert got == pytest.approx(ratio) and (warning is None) is fine
    for n in ((1, 9), (9, 1), (3, 7), (5, 5)): assert check_weights(*n, *balanced_weights(*n)) == (pytest.approx(1.), None)
    assert balanced_weights(100, 400) == (4., 1.) and "desirable_weight=4" in check_weights(100, 400)[1]
    assert check_weights(5, 0)[0] == math.inf and check_weights(0, 5)[0] == 0 and all(check_weights(*n)[1] for n in ((5, 0), (0, 5)))
    with pytest.raises(ValueError, match="one of each"): balanced_weights(3, 0)


# --- where it ends -----------------------------------------------------------------------------------------------
def _descend(p_good, beta, w_d, w_u):
    ref = torch.full_like(p_good, 1/len(p_good)).log()
    logits = ref.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=.5)
    for _ in range(300):
        optimizer.zero_grad()
        logps = logits.log_softmax(-1)
        z = (logps.exp()*(logps - ref)).sum()
        good, bad = (kto_loss(logps, ref, torch.full((len(ref),), k), z, beta, w_d, w_u, reduction="none") for k in (True, False))
        (p_good*good + (1 - p_good)*bad).mean().backward()
        optimizer.step()
    return logits.detach().softmax(-1)


@pytest.mark.parametrize("beta, w_d, w_u, threshold", [(1., 1., 1., .5), (.1, 1., 1., .5), (.1, 1., 3., .75), (.1, 3., 1., .25)])
def test_replies_below_the_threshold_vanish(beta, w_d, w_u, threshold):
    p_good = torch.tensor([.1, .4, .6, .9], dtype=torch.float64)
    end = _descend(p_good, beta, w_d, w_u)
    assert (end[p_good < threshold] < 1e-3).all() and end[-1] > .3
    w, l = map(list, zip(*itertools.permutations(range(4), 2)))
    often, ref = p_good[w]*(1 - p_good[l]), torch.zeros(12, dtype=torch.float64)
    soft = fit_policy(lambda logps: (often*dpo_loss(logps[w], logps[l], ref, ref, beta=1., reduction="none")).sum(), 4).exp()
    odds = torch.tensor([1/9, 2/3, 3/2, 9.], dtype=torch.float64)
    assert_close(soft, odds/odds.sum(), atol=1e-5, rtol=1e-4)


# --- another library ---------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("labels", [[True, False, False, True], [True]*4, [False]*4])
@pytest.mark.parametrize("settings", [dict(beta=.1), dict(beta=.7, desirable_weight=2., undesirable_weight=1.5)])
def test_same_loss_as_trl(labels, settings):
    # item 76, item 77, item 82
    from trl_stub import random_table, reply_sums, trl_loss
    prompts, replies = [[1, 2], [3], [4, 5, 6], [7]], [[2, 3, 4], [5, 6], [7, 8, 9, 10], [1]]
    for seed in (0, 2):
        policy, ref = random_table(seed), random_table(seed + 1)
        for foreign in ([replies[-1], *replies[:-1]], [replies[1], replies[2], replies[3], replies[0]]):
            z = kto_kl(reply_sums(policy, prompts, foreign), reply_sums(ref, prompts, foreign))
            ours = kto_loss(reply_sums(policy, prompts, replies), reply_sums(ref, prompts, replies), torch.tensor(labels), z, **settings)
            assert_close(trl_loss("KTO", policy, ref, prompts, replies, labels, foreign, **settings), ours.detach(), atol=1e-5, rtol=1e-5)
