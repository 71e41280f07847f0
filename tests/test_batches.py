"Encoding, splitting, padding and packing: expected ids, positions and masks written by hand or by brute force."
import random
import pytest, torch
from hypothesis import given, settings, strategies as st
from ftcourse.data.batches import Tree, attention_mask, collate, encode, encode_rows, first_fit, loaders, pack, prompt_of, split_rows, staircase
from ftcourse.tokens import tiny_tokenizer


@pytest.fixture(scope="module")
def tok(): return tiny_tokenizer()


def say(role, text): return {"role": role, "content": text}


TALK = [say("system", "Be kind."), say("user", "Hi ☕"), say("assistant", "Hello!\n\nHow are you?"), say("user", "Fine"), say("assistant", "Good. ")]


def counted(tok, tree, k=0): return tok.decode([t for t, m in zip(tree.replies[k], tree.masks[k]) if m])


def test_every_reply_of_a_conversation_counts_with_its_end_token(tok):
    # item 45 and item 46: what counts is exactly the assistants' texts, each with its end token
    tree = encode({"messages": TALK}, tok)
    assert counted(tok, tree) == "Hello!\n\nHow are you?<|im_end|>Good. <|im_end|>"
    assert tree.replies[0][-1] == tok.convert_tokens_to_ids("<|im_end|>") and tree.masks[0][-1] == 1
    assert tok.decode(tree.prompt_ids) == "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi ☕<|im_end|>\n<|im_start|>assistant\n"


def test_pad_is_end_token(tok):
    # item 10: pad id and end id are one here, and the end token still counts in every reply, in batches of any shape
    assert tok.pad_token_id == tok.eos_token_id == tok.convert_tokens_to_ids("<|im_end|>")
    trees = [encode({"messages": TALK}, tok), encode({"messages": TALK[:3]}, tok)]
    for kw in (dict(), dict(max_tokens=500), dict(share=False)):
        batch = pack(trees, pad_id=tok.pad_token_id, **kw)
        assert (batch.targets == tok.eos_token_id).sum() == 3
    targets = collate([[5, 2, 7], [8]], pad_id=2)[1]
    assert targets.tolist() == [[2, 7, 2], [2, -100, -100]]


@pytest.mark.parametrize("bos", [False, True])
def test_exactly_one_bos(bos):
    # item 44: also where the tokenizer adds one, the template prints one, or the text brings its own
    from tokenizers.processors import TemplateProcessing
    tok = tiny_tokenizer()
    tok.bos_token = "<|endoftext|>"
    if bos: tok.backend_tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tok.chat_template = "{{ bos_token }}" + tok.chat_template
    rows = [{"messages": TALK}, {"prompt": TALK[:2], "chosen": TALK[2:3], "rejected": [say("assistant", "No.")]}, {"prompt": "<|endoftext|>Hi", "completion": " you"}]
    for row in rows:
        tree = encode(row, tok)
        for reply in tree.replies: assert (tree.prompt_ids + reply).count(0) == 1 and tree.prompt_ids[0] == 0
    tree = encode({"prompt": "Hi", "completion": " you"}, tok)
    assert (tree.prompt_ids + tree.replies[0]).count(0) == int(bos)


def test_end_token_is_not_doubled():
    from tokenizers.processors import TemplateProcessing
    tok = tiny_tokenizer()
    tok.backend_tokenizer.post_processor = TemplateProcessing(single="$A <|im_end|>", special_tokens=[("<|im_end|>", 2)])
    tree = encode({"prompt": "Hi", "completion": " you"}, tok)
    assert tok.decode(tree.prompt_ids) == "Hi" and tok.decode(tree.replies[0]) == " you<|im_end|>"
    assert tok.decode(encode({"prompt": "Hi", "completion": " you<|im_end|>"}, tok).replies[0]) == " you<|im_end|>"


def test_prompt_must_be_a_prefix(tok):
    # item 47: in letters ...
    other = tiny_tokenizer()
    other.chat_template = tok.chat_template.replace("<|im_start|>assistant\\n", "<|im_start|>assistant: ").replace("<|im_start|>assistant\n", "<|im_start|>assistant: ")
    with pytest.raises(ValueError, match="row 3.*doesn't begin with the prompt"): encode({"messages": TALK}, other, row_index=3)
    # ... and in ids: a tokenizer that joins "a" and "b" across the border
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    core = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "</s>": 3, " ": 4}, merges=[("a", "b")]))
    joins = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    assert encode({"prompt": "a", "completion": " b"}, joins).replies == ((4, 1, 3),)
    with pytest.raises(ValueError, match="row 5.*joins"): encode({"prompt": "a", "completion": "b"}, joins, row_index=5)
    joins.chat_template = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    with pytest.raises(ValueError, match="row 6.*beginning of the ids"): encode({"messages": [say("user", "a"), say("assistant", "b")]}, joins, row_index=6)


@pytest.mark.parametrize("row", [
    {"messages": TALK[:2]}, {"messages": []}, {"messages": TALK[:2] + [say("assistant", "")]}, {"messages": TALK[:2] + [say("assistant", " \n")]},
    {"prompt": "Hi", "completion": ""}, {"prompt": TALK[:2], "completion": [say("user", "me again")]}, {"prompt": "Hi", "completions": []},
    {"prompt": TALK[:2], "chosen": TALK[2:3], "rejected": []}])
def test_nothing_to_learn_is_an_error(tok, row):
    # item 48
    with pytest.raises(ValueError, match="row 11"): encode(row, tok, row_index=11)


def test_batch_encoding_trap(tok):
    # item 49: apply_chat_template gives a BatchEncoding, whose len() is 2; our ids are ints and as many as the text has
    out = tok.apply_chat_template(TALK[:3], tokenize=True, return_dict=True)
    assert len(out) == 2
    tree = encode({"messages": TALK[:3]}, tok)
    assert list(tree.prompt_ids + tree.replies[0]) == out["input_ids"][:-1]
    assert all(type(t) is int for t in tree.prompt_ids + tree.replies[0])


def test_both_replies_of_a_pair_have_prompt_and_padding_masked(tok):
    # item 54: only reply tokens are targets
    # item 55: every target is a valid id
    pair = {"prompt": TALK[:2], "chosen": TALK[2:3], "rejected": [say("assistant", "No.")]}
    tree = encode(pair, tok)
    assert [counted(tok, tree, k) for k in (0, 1)] == ["Hello!\n\nHow are you?<|im_end|>", "No.<|im_end|>"]
    for kw in (dict(), dict(max_tokens=300), dict(share=False)):
        batch = pack([tree], pad_id=tok.pad_token_id, **kw)
        assert tok.decode(batch.targets) == "Hello!\n\nHow are you?<|im_end|>No.<|im_end|>"
        assert batch.targets.min() >= 0
        assert (batch.reply_ids.flatten()[batch.sources] >= 0).all() and (batch.tree_ids.flatten()[batch.sources] == 0).all()


def test_targets_follow_their_sources():
    # item 53: shifted by one, exactly once; a reply's first token is predicted by the prompt's last
    trees = [Tree((10, 11), ((20, 21), (30,)), ((1, 1), (1,)), 0), Tree((12,), ((40, 41, 42),), ((0, 1, 0),), 1)]
    for kw in (dict(max_tokens=9), dict(), dict(share=False)):
        batch = pack(trees, **kw)
        assert batch.input_ids.flatten()[batch.sources].tolist() == [11, 20, 11, 40]
        assert batch.targets.tolist() == [20, 21, 30, 41]
        assert batch.slots.tolist() == [0, 1, 3, 7]


tree_strategy = st.builds(
    lambda p, rs: Tree(tuple(p), tuple(tuple(r) for r, _ in rs), tuple(tuple(m[:len(r)]) for r, m in rs)),
    st.lists(st.integers(3, 99), min_size=1, max_size=6),
    st.lists(st.tuples(st.lists(st.integers(3, 99), min_size=1, max_size=6), st.lists(st.integers(0, 1), min_size=6, max_size=6)), min_size=1, max_size=3))


@settings(max_examples=150, deadline=None)
@given(st.lists(tree_strategy, min_size=1, max_size=6), st.integers(0, 30), st.booleans())
def test_pack_by_brute_force(trees, room, share):
    # item 51: mask, positions, sources and slots against a slow reading of the definition
    longest = max(len(t) for t in trees)
    batch = pack(trees, pad_id=1, max_tokens=longest + room, share=share)
    mask = attention_mask(batch)[:, 0] == 0
    N, T = batch.input_ids.shape
    at = {}                                              # (tree, reply, place in prompt or reply) -> where
    for n in range(N):
        seen = {}
        for t in range(T):
            key = (n, batch.tree_ids[n, t].item(), batch.reply_ids[n, t].item())
            seen[key] = seen.get(key, -1) + 1
            at[(*key, seen[key])] = t
    flat, R = [], 0
    for i, tree in enumerate(trees):
        for k, (reply, m) in enumerate(zip(tree.replies, tree.masks), 1):
            r = R if not share else next(n for n in range(N) if (n, i, 0, 0) in at)
            k = k if (r, i, k, 0) in at else 1
            path = [at[(r, i, 0, j)] for j in range(len(tree.prompt_ids))] + [at[(r, i, k, j)] for j in range(len(reply))]
            assert batch.input_ids[r, path].tolist() == list(tree.prompt_ids + reply)
            assert batch.position_ids[r, path].tolist() == list(range(len(path)))
            for j, t in enumerate(path): assert mask[r, t].nonzero()[:, 0].tolist() == sorted(path[:j + 1])
            flat += [(r*T + path[len(tree.prompt_ids) + j - 1], y, R*batch.reply_mask.shape[1] + j) for j, (y, c) in enumerate(zip(reply, m)) if c]
            R += 1
    assert list(zip(batch.sources.tolist(), batch.targets.tolist(), batch.slots.tolist())) == flat
    assert batch.reply_mask.shape[0] == R and batch.reply_mask.sum() == len(flat) == batch.n_tokens
    assert (batch.tree_ids >= 0).sum() == (sum(len(t) for t in trees) if share else sum(len(t.prompt_ids) + len(r) for t in trees for r in t.replies))
    assert mask.any(-1).all()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=25), st.integers(20, 40))
def test_first_fit_keeps_all_and_its_bound(lengths, capacity):
    rows = first_fit(lengths, capacity)
    assert sorted(i for r in rows for i in r) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in r) <= capacity for r in rows)
    assert len(rows) <= 11/9*max(-(-sum(lengths)//capacity), 1) + 6/9 or len(rows) <= 2*sum(lengths)/capacity + 1


def test_a_longer_row_changes_nothing_but_padding():
    trees = [Tree((5, 6), ((7, 8),), ((1, 1),), 4)]
    a, b = pack(trees), pack(trees, max_tokens=9, pad_id=3)
    assert torch.equal(a.targets, b.targets) and torch.equal(a.slots, b.slots) and torch.equal(a.input_ids[0], b.input_ids[0, :4])
    assert a.rows == b.rows == (4,) and a.n_packed == 4 and b.n_packed == 9
    with pytest.raises(ValueError, match="row 4 has 4 tokens"): pack(trees, max_tokens=3)
    with pytest.raises(ValueError, match="no trees"): pack([])


def test_a_reply_without_a_prompt_skips_its_first_token(tok):
    tree = encode({"prompt": "", "completion": "abc"}, tok)
    assert tree.prompt_ids == () and tree.masks == ((0, 1, 1, 1),)
    batch = pack([tree])
    assert batch.input_ids[0, batch.sources].tolist() == list(tree.replies[0][:3]) and batch.targets.tolist() == list(tree.replies[0][1:])


def test_completions_and_prompts_with_earlier_turns(tok):
    tree = encode({"prompt": TALK[:4], "completions": [[say("assistant", "A")], [say("assistant", "B")], [say("assistant", "C")]]}, tok)
    assert [counted(tok, tree, k) for k in range(3)] == ["A<|im_end|>", "B<|im_end|>", "C<|im_end|>"]
    assert "How are you?" in tok.decode(tree.prompt_ids)                     # an earlier reply in the prompt isn't learnt


def test_a_template_that_trims(tok):
    trims = tiny_tokenizer()
    trims.chat_template = tok.chat_template.replace("message['content']", "message['content'] | trim")
    assert counted(trims, encode({"messages": TALK}, trims)) == "Hello!\n\nHow are you?<|im_end|>Good.<|im_end|>"


def test_the_end_token_inside_a_reply_is_an_error(tok):
    with pytest.raises(ValueError, match="stands inside a reply"): encode({"messages": TALK[:2] + [say("assistant", "a<|im_end|>b")]}, tok)


def test_no_template_says_what_to_do(tok):
    plain = tiny_tokenizer()
    plain.chat_template = None
    with pytest.raises(ValueError, match="no chat template"): encode({"messages": TALK}, plain)


def test_encode_rows_counts_problems(tok):
    bad = [{"messages": TALK[:2]}]*30
    with pytest.raises(ValueError) as e: encode_rows([{"messages": TALK}] + bad, tok)
    assert "30 of 31 rows" in str(e.value) and "and 10 more" in str(e.value) and str(e.value).count("encode: row") == 20


def test_long_rows_are_dropped_aloud_or_refused(tok, capsys):
    rows = [{"prompt": "a", "completion": " " + "b"*n} for n in (1, 50, 2)]
    with pytest.raises(ValueError, match="1 of 3 rows"): encode_rows(rows, tok, max_len=20)
    assert [t.row for t in encode_rows(rows, tok, max_len=20, on_long="drop")] == [0, 2]
    assert "1 of 3 rows are longer than 20 tokens" in capsys.readouterr().out
    with pytest.raises(ValueError, match="on_long"): encode_rows(rows, tok, on_long="cut")


def test_split_keeps_equal_prompts_together():
    rng = random.Random(0)
    rows = [{"prompt": f"q{rng.randrange(300)}", "completion": str(i)} for i in range(1000)]
    parts = split_rows(rows, seed=2)
    assert sum(map(len, parts)) == 1000 and sorted(r["completion"] for p in parts for r in p) == sorted(r["completion"] for r in rows)
    keys = [{r["prompt"] for r in p} for p in parts]
    assert not (keys[0] & keys[1] or keys[1] & keys[2] or keys[0] & keys[2])
    for part, share in zip(parts, (.85, .05, .1)): assert abs(len(part)/1000 - share) < .02
    with pytest.raises(ValueError, match="sum to 1"): split_rows(rows, (.5, .2))
    assert split_rows(rows, (1., 0.))[1] == []


def test_prompt_of_reads_every_kind_of_row():
    same = [{"messages": [say("user", "Hi  there"), say("assistant", "x")]}, {"prompt": "hi there", "completion": "y"},
            {"prompt": [say("user", "Hi there")], "chosen": [], "rejected": []}, {"text": "Hi there"}]
    assert len({prompt_of(r) for r in same}) == 1


def test_loaders_shuffle_training_only_and_repeat():
    splits = list(range(20)), list(range(5)), list(range(3))
    one, two = loaders(splits, list, 8, seed=1), loaders(splits, list, 8, seed=1)
    epochs = [[list(b) for b in one[0]] for _ in range(2)]
    assert epochs[0] != epochs[1] and sorted(sum(epochs[0], [])) == list(range(20)) and epochs[0] == [list(b) for b in two[0]]
    assert [list(b) for b in one[1]] == [[0, 1, 2, 3, 4]] and [list(b) for b in one[2]] == [[0, 1, 2]]


def test_collate_cuts_and_pads_to_the_context():
    ids, targets = collate([[1, 2, 3, 4], [5]], 9, max_len=3)
    assert ids.tolist() == [[1, 2, 3], [5, 9, 9]] and targets.tolist() == [[2, 3, 4], [9, -100, -100]]
    assert collate([[1]], 9, max_len=4, pad_to_max=True)[0].tolist() == [[1, 9, 9, 9]]
    with pytest.raises(ValueError, match="needs max_len"): collate([[1]], 9, pad_to_max=True)
    assert staircase([1]) == [] and staircase([1, 2]) == [([1], 2)]


@pytest.mark.slow
@pytest.mark.real
def test_every_instruction_with_the_real_tokenizer():
    # item 46 on 1,100 rows
    from ftcourse.data.formats import to_messages
    from ftcourse.data.sets import load_set
    from ftcourse.models import load
    tok = load("smollm2-135m")[1]
    rows = load_set("instructions")
    for r, t in zip(rows, encode_rows([to_messages(r) for r in rows], tok)):
        assert tok.decode(t.replies[0]) == r["output"] + "<|im_end|>" and all(t.masks[0])
