"""Plausible wrong answers to the exercises of 5_evals/scoring."""
def _all_tokens(texts): return sum(map(len, texts))
def _kinds(texts): return len({i for t in texts for i in t})
def _whole_texts(texts): return len({tuple(t) for t in texts})
def _pairs(texts): return len({(i, t[i]) for t in texts for i in range(len(t))})
def _empty_too(texts): return len({tuple(t[:i]) for t in texts for i in range(len(t) + 1)})

def _causal(i, j, ends): return j <= i
def _below(i, j, ends): return i <= j <= ends[i]
def _not_itself(i, j, ends): return j < i <= ends[j]
def _strict_end(i, j, ends): return j <= i < ends[j]

def _plain(n_tokens, max_len, context_len): return -(-n_tokens//max_len)
def _no_overlap(n_tokens, max_len, context_len): return (n_tokens > 0) + -(-max(n_tokens - max_len, 0)//(max_len - context_len)) if max_len > context_len else 1
def _every_step(n_tokens, max_len, context_len): return -(-n_tokens//(max_len - context_len + 1))
def _down(n_tokens, max_len, context_len): return (n_tokens > 0) + max(n_tokens - max_len, 0)//(max_len - context_len + 1)

WRONG = {"scoring.1": [_all_tokens, _kinds, _whole_texts, _pairs, _empty_too], "scoring.2": [_causal, _below, _not_itself, _strict_end], "scoring.3": [_plain, _no_overlap, _every_step, _down]}
