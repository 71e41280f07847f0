"""Plausible wrong answers to the exercises of 3_tune/adapters."""
import torch

def _svd(W): return torch.linalg.svd(W, full_matrices=False)
def _all_in_a(W, r):
    U, S, Vh = _svd(W)
    A, B = S[:r, None]*Vh[:r], U[:, :r]
    return A, B, W - B@A
def _no_root(W, r):
    U, S, Vh = _svd(W)
    A, B = S[:r, None]*Vh[:r], U[:, :r]*S[:r]
    return A, B, W - B@A
def _smallest(W, r):  # the weakest directions
    U, S, Vh = _svd(W)
    A, B = S[-r:, None].sqrt()*Vh[-r:], U[:, -r:]*S[-r:].sqrt()
    return A, B, W - B@A
def _whole_base(W, r):  # as LoRA does: then the start isn't W
    A, B, _ = _all_in_root(W, r)
    return A, B, W
def _all_in_root(W, r):
    U, S, Vh = _svd(W)
    A, B = S[:r, None].sqrt()*Vh[:r], U[:, :r]*S[:r].sqrt()
    return A, B, W - B@A
def _vh_not_turned(W, r):  # columns of Vh instead of its rows
    U, S, Vh = _svd(W)
    A, B = S[:r, None].sqrt()*Vh.T[:r], U[:, :r]*S[:r].sqrt()
    return A, B, W - B@A

def _columns(W0, A, B, scale, m):
    W = W0 + scale*B@A
    return m[:, None]*W/W.norm(dim=0, keepdim=True)
def _length_of_base(W0, A, B, scale, m): return m[:, None]*(W0 + scale*B@A)/W0.norm(dim=1, keepdim=True)
def _only_base_turned(W0, A, B, scale, m): return m[:, None]*W0/W0.norm(dim=1, keepdim=True) + scale*B@A
def _no_scale(W0, A, B, scale, m):
    W = W0 + B@A
    return m[:, None]*W/W.norm(dim=1, keepdim=True)
def _no_length(W0, A, B, scale, m): return m[:, None]*(W0 + scale*B@A)
def _square(W0, A, B, scale, m):
    W = W0 + scale*B@A
    return m[:, None]*W/W.square().sum(1, keepdim=True)

WRONG = {"adapters.1": [_all_in_a, _no_root, _smallest, _whole_base, _vh_not_turned],
         "adapters.2": [_columns, _length_of_base, _only_base_turned, _no_scale, _no_length, _square], "adapters.3": [1, 0.5, 0.25, -1]}
