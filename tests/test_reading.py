"""Reading data files: every row comes back, or a DataError says what is wrong. Faults one by one, then 1,000 mutated files."""
import csv, gzip, io, json, os, pickle, random, re, tempfile, tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from ftcourse.data.reading import DataError, Problem, excerpt, iter_rows, read_rows

GOOD = [{"prompt": "2+2?", "completion": "4"}, {"prompt": "ყველა 😀", "completion": "a\nb", "n": [1, 2.5, None, True]}]
GOOD_LINES = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in GOOD)


def problems(source, **kwargs):
    "The DataError of a source that must be refused."
    with pytest.raises(DataError) as caught: read_rows(source, **kwargs)
    error = caught.value
    assert isinstance(error, ValueError) and 1 <= len(error.problems) <= error.total
    for p in error.problems:
        assert str(p) in str(error) and len(p.excerpt) <= 60 and "\n" not in str(p) and p.what
    return error


def put(folder, name, data):
    "A file with these bytes (or text as UTF-8), packed where its name ends in .gz."
    data = data.encode() if isinstance(data, str) else data
    path = Path(folder) / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


# --- what is good is read -----------------------------------------------------------------------------------
@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_jsonl(tmp_path, packed, bom, end):
    text = bom + GOOD_LINES.replace("\n", end)
    for name in ("a.jsonl", "b.ndjson", "C.JSONL"):
        assert read_rows(put(tmp_path, name + packed, text)) == GOOD
        assert read_rows(str(put(tmp_path, name + packed, text.rstrip("\r\n")))) == GOOD  # no line end after the last row


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("style", [dict(), dict(indent=2), dict(ensure_ascii=False), dict(separators=(",", ":"))])
def test_json_list(tmp_path, packed, bom, style):
    assert read_rows(put(tmp_path, "a.json" + packed, bom + json.dumps(GOOD, **style) + "\n ")) == GOOD


def test_json_other_shapes(tmp_path):
    assert read_rows(put(tmp_path, "lines.json", GOOD_LINES)) == GOOD
    assert read_rows(put(tmp_path, "one.json", json.dumps(GOOD[1], indent=4))) == GOOD[1:]
    assert read_rows(put(tmp_path, "close.json", '[{"a":1},{"b":[]}]')) == [{"a": 1}, {"b": []}]


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_csv(tmp_path, packed, bom):
    out = io.StringIO(newline="")
    rows = [{"a": "x, y", "b": 'say "hi"'}, {"a": "", "b": "line 1\r\nline 2\n\nline 4"}, {"a": " კ ", "b": "😀"}]
    writer = csv.DictWriter(out, ["a", "b"])
    writer.writeheader()
    writer.writerows(rows)
    assert read_rows(put(tmp_path, "t.csv" + packed, bom + out.getvalue())) == rows
    assert read_rows(put(tmp_path, "long.csv" + packed, "a,b\n" + "x" * 300_000 + ",y\n")) == [{"a": "x" * 300_000, "b": "y"}]


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_parquet(tmp_path, packed):
    import pyarrow as pa, pyarrow.parquet as pq
    rows = [{"messages": [{"role": "user", "content": f"ყ {i}"}, {"role": "assistant", "content": None}], "n": i, "x": i / 3} for i in range(700)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=100)
    data = (tmp_path / "t.parquet").read_bytes()
    assert read_rows(put(tmp_path, "u.parquet" + packed, data)) == rows
    damaged = problems(put(tmp_path, "v.parquet" + packed, data[:-20] + b"PAR1"))
    assert "Parquet" in damaged.problems[0].what
    assert "no rows" in problems(put(tmp_path, "w.parquet" + packed, _empty_parquet(tmp_path))).problems[0].what


def _empty_parquet(folder):
    import pyarrow as pa, pyarrow.parquet as pq
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), folder / "none.parquet")
    return (folder / "none.parquet").read_bytes()


def test_lists_and_datasets_pass_through():
    import datasets
    assert read_rows(GOOD) == GOOD and read_rows(GOOD)[0] is GOOD[0] and read_rows([]) == []
    rows = [{"a": "x", "b": 1}, {"a": "y", "b": 2}]
    table = datasets.Dataset.from_list(rows)
    assert read_rows(table) == rows and read_rows(table.to_iterable_dataset()) == rows
    assert next(iter_rows({"n": i} for i in iter(int, 1))) == {"n": 0}  # an endless source streams
    assert "choose one of train" in str(problems(datasets.DatasetDict(train=table)))
    assert "to_dict" in str(problems(table.to_pandas()))


def test_bare_lists_of_messages(tmp_path):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert read_rows(put(tmp_path, "a.jsonl", json.dumps(chat) + "\n" + json.dumps(chat))) == [{"messages": chat}] * 2
    assert read_rows(put(tmp_path, "a.json", json.dumps([chat, chat]))) == [{"messages": chat}] * 2
    assert read_rows([chat]) == [{"messages": chat}]


def test_blank_lines_are_allowed_and_keep_their_numbers(tmp_path):
    assert read_rows(put(tmp_path, "a.jsonl", '\n{"a": 1}\n \t\n\r\n{"a": 2}\n\n')) == [{"a": 1}, {"a": 2}]
    assert problems(put(tmp_path, "a.jsonl", '\n{"a": 1}\n\n{"a": \n')).problems[0].line == 4
    assert problems(put(tmp_path, "a.csv", "a,b\n\n1,2\n\n1\n")).problems[0].line == 5


# --- what is bad is told ------------------------------------------------------------------------------------
LINE_FAULTS = {  # text of a line -> words that must be said
    '{"a": "cut': "cut off", '{"a": 1': "cut off", '{"a": NaN}': "NaN", '{"a": [-Infinity]}': "-Infinity", '{"a": 1e999}': "too large",
    '{"a": "\\ud83d"}': "half a character", '{"\\udc00": 1}': "half a character", '[1, 2]': "not a list", '"text"': "not a string", "7": "not a number",
    "null": "not null", "true": "not true or false", "[]": "not a list", '{"a": 1, "a": 1}': 'key "a"', '{"x": [{"b": {}, "b": {}}]}': 'key "b"',
    "{'a': 1}": "not JSON", '{"a": 1,}': "not JSON", '{"a": 1} {"b": 2}': "follows", '{"a": "tab\there"}': "control character",
    "\ufeff" + '{"a": 1}': "byte order mark", '{"a": ' + "9" * 5000 + "}": "5000 digits", "[" * 100_000: "nested too deep", "\x0b": "not JSON", "\u2028": "not JSON"}


@pytest.mark.parametrize("text", LINE_FAULTS, ids=lambda t: repr(t[:20]))
def test_faulty_line(tmp_path, text):
    error = problems(put(tmp_path, "a.jsonl", f'{{"a": 1}}\n{text}\n{{"a": 2}}\n'))
    assert error.total == 1 and not error.stopped
    p = error.problems[0]
    assert (p.file, p.line) == ("a.jsonl", 2) and LINE_FAULTS[text] in p.what
    assert p.excerpt[:8] == excerpt(text)[:8]
    if text[0] in '{"n7t[': assert read_or_told(put(tmp_path, "a.json", f'[{{"a": 1}},\n{text}\n, {{"a": 2}}]')) is not None


def read_or_told(path):
    try: read_rows(path)
    except DataError as e: return e


@pytest.mark.parametrize("text", ['[{"a": 1}', '[{"a": 1},]', '[{"a": 1} {"b": 2}]', '[{"a": 1}] []', '[{"a": 1}, 3]', '[{"a": 1}, {"b": NaN}]', '[{"a": 1},,{"a": 1}]',
                                  "[", "[,]", "]", "{", '{"a": 1} x', '[{"a": 1}]]', '{"a": 1}\n,{"a": 2}', '[{"a": "' + "x" * 200_000, '[{"a": "\\ud83', "[1"])
def test_faulty_json(tmp_path, text):
    with pytest.raises((Bad, ValueError)): judge_json(text.encode())
    problems(put(tmp_path, "a.json", text))


def test_json_names_the_line(tmp_path):
    error = problems(put(tmp_path, "a.json", '[\n {"a": 1},\n {"a": NaN},\n {"a": 1, "a": 2},\n 5,\n {"a": 3,\n  "b": x}\n]'))
    assert [p.line for p in error.problems] == [3, 4, 5, 7] and error.stopped and "may be more" in str(error)


@pytest.mark.parametrize("text, line, words", [
    ("a,b\n1,2\n1,2,3\n", 3, "3 cells where the header has 2"), ("a,b\n1\n", 2, "1 cells"), ("a,a\n1,2\n", 1, "two columns are named 'a'"),
    ("a,\n1,2\n", 1, "column 2 has no name"), ("a;b\n1;2\n", 1, "';'"), ("a\tb\n1\t2\n", 1, r"'\t'"), ("a, b\n1,2\n", 1, "spaces"),
    ('a,b\n"1,2\n3,4\n', 2, "not CSV"), ('a,b\n"1"x,2\n', 2, "not CSV"), ("a,b\n1,2\n\x00,4\n", 0, "binary"), ("a,b\n", 0, "no rows"),
    ('a,b\n"x\ny",1\n2\n', 4, "1 cells"), ("a,b\rc,d\re,f\r", 1, "not CSV")])
def test_faulty_csv(tmp_path, text, line, words):
    p = problems(put(tmp_path, "t.csv", text)).problems[0]
    assert p.line == line and words in p.what


def test_file_faults(tmp_path):
    def what(name, data): return problems(put(tmp_path, name, data)).problems[0].what
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz"): assert "empty" in what(name, "")
    for name in ("a.jsonl", "a.json", "a.csv"):
        assert "no rows" in what(name, "\r\n\n"), name
        assert "binary" in what(name, os.urandom(99) + b"\0" * 9)
        assert "gzip" in what(name, gzip.compress(b"x"))
        assert "zip" in what(name, b"PK\x03\x04abc")
        assert "UTF-16" in what(name, '{"a": 1}'.encode("utf-16"))
        assert "LFS" in what(name, "version https://git-lfs.github.com/spec/v1\noid sha256:1")
        assert "Parquet" in what(name, b"PAR1abc")
    assert "no rows" in what("a.json", "[]")
    assert "Parquet" in what("a.parquet", GOOD_LINES)
    (tmp_path / "plain.jsonl.gz").write_text(GOOD_LINES)
    assert "gzip" in str(problems(tmp_path / "plain.jsonl.gz"))


def test_path_faults(tmp_path):
    put(tmp_path, "train.jsonl", GOOD_LINES)
    assert "did you mean train.jsonl" in str(problems(tmp_path / "trian.jsonl"))
    assert "no such file" in str(problems(tmp_path / "zzz.csv"))
    assert "no folder" in str(problems(tmp_path / "no" / "a.csv"))
    assert "folder" in str(problems(tmp_path)) and "train.jsonl" in str(problems(tmp_path))
    assert "must end in" in str(problems(put(tmp_path, "a.txt", "x"))) and "must end in" in str(problems(put(tmp_path, "a.gz", "x")))
    for odd in ("", "x" * 5000 + ".jsonl", "a\0.jsonl"): problems(odd)
    if os.geteuid():
        put(tmp_path, "secret.jsonl", GOOD_LINES).chmod(0)
        assert "cannot be read" in str(problems(tmp_path / "secret.jsonl"))


def test_source_faults():
    assert problems([{"a": 1}, 3, None, "x"]).total == 3
    for odd in (None, 3, b"x", {"a": 1}, {"a": [1]}, {}): problems(odd)


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_gzip_cut_or_changed(tmp_path, cut):
    whole = gzip.compress(GOOD_LINES.encode() * 50)
    for name in ("a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.parquet.gz"):
        (tmp_path / name).write_bytes(whole[:-cut])
        problems(tmp_path / name)
    middle = len(whole) // 2
    (tmp_path / "b.jsonl.gz").write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1:])
    problems(tmp_path / "b.jsonl.gz")


def test_bad_utf8_says_where(tmp_path):
    first = '{"a": "ყ"}\n'.encode()
    for bom in (b"", b"\xef\xbb\xbf"):
        data = bom + first + b'{"a": "caf\xe9"}\n' + b'{"a": "\xed\xa0\x80"}\n'
        error = problems(put(tmp_path, "a.jsonl", data))
        assert [p.line for p in error.problems] == [2, 3]
        assert f"byte 0xe9 at offset {data.index(0xe9)} of the file (10 of the line)" in error.problems[0].what
        json_data = bom + b"[" + b'{"a": 1},\n' * 20_000 + b'{"a": "\xe9"}]'
        error = problems(put(tmp_path, "a.json", json_data))
        assert f"byte 0xe9 at offset {json_data.index(0xe9):,} of the file" in error.problems[0].what and error.problems[0].line == 20_001
        assert "0xe9" in str(problems(put(tmp_path, "a.csv", bom + b"a,b\n1,\xe9\n")))


def test_a_long_line_is_told_and_not_held(tmp_path):
    big = b'{"a": "' + b"x" * 10_000_000 + b'"}\n'
    for name, data in (("a.jsonl", b'{"a": 1}\n' + big + b"{\n"), ("a.csv", b"a,b\n" + big + b"1\n"), ("a.json", b'[{"a": 1},\n' + big + b"]")):
        error = problems(put(tmp_path, name, data))
        assert error.problems[0].line == 2 and "10,000,000" in error.problems[0].what
        if name != "a.json": assert error.problems[1].line == 3 and "10,000,010 bytes" in error.problems[0].what
    assert read_rows(put(tmp_path, "b.jsonl", big), max_row_bytes=20_000_000) == [{"a": "x" * 10_000_000}]
    for n in (99, 100, 101):  # the limit counts the line without its end
        text = '{"a":"' + "x" * (n - 8) + '"}'
        assert len(text) == n
        for end in ("", "\n"): assert (read_or_none(put(tmp_path, "c.jsonl", text + end), 100) is None) == (n > 100)


def read_or_none(path, limit):
    try: return read_rows(path, max_row_bytes=limit)
    except DataError: return None


def test_twenty_at_once_and_the_rest_counted(tmp_path):
    path = put(tmp_path, "a.jsonl", "".join('{"a": 1}\n' if i % 2 else "oops\n" for i in range(200)))
    error = problems(path)
    assert len(error.problems) == 20 and error.total == 100 and "and 80 more" in str(error)
    assert [p.line for p in error.problems] == list(range(1, 41, 2))
    assert len(problems(path, max_problems=3).problems) == 3
    again = pickle.loads(pickle.dumps(error))
    assert again.problems == error.problems and again.total == 100 and str(again) == str(error)
    assert error.problems[0] == Problem("a.jsonl", 1, error.problems[0].what, "oops")


def test_no_row_follows_a_problem(tmp_path):
    rows = iter_rows(put(tmp_path, "a.jsonl", '{"a": 1}\noops\n{"a": 2}\n'))
    assert next(rows) == {"a": 1}
    with pytest.raises(DataError): next(rows)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz"])
def test_streams(tmp_path, name):
    row = {"a": "x" * 1000, "b": "y"}
    one = json.dumps(row)
    text = {"a.json": "[" + ",".join([one] * 20_000) + "]", "a.csv": "a,b\n" + ("x" * 1000 + ",y\n") * 20_000}.get(name, (one + "\n") * 20_000)
    path = put(tmp_path, name, text)
    del text
    tracemalloc.start()
    assert sum(r == row for r in iter_rows(path)) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e6, f"{peak/1e6:.1f} MB for a file of 20 MB"


def test_excerpt():
    assert excerpt("abc\n") == "abc" and excerpt("\x1b[31m\x07") == r"\x1b[31m\x07" and excerpt("\ud800") == r"\ud800"
    assert len(excerpt("\0" * 1000)) == 60 and len(excerpt(b"\xff" * 1000)) == 60 and excerpt("ყ😀") == "ყ😀"


# --- 1,000 mutated files ------------------------------------------------------------------------------------
class Bad(Exception): pass


def _strict(text):
    "json.loads that refuses what RFC 8259 calls unsafe: the independent judge."
    def pairs(p):
        if len({k for k, _ in p}) < len(p): raise Bad
        return dict(p)
    def no(_): raise Bad
    value = json.loads(text, object_pairs_hook=pairs, parse_constant=no)
    flat = repr(value)
    if "inf" in flat.replace("'inf", ""):
        def floats(v): return any(map(floats, v.values() if isinstance(v, dict) else v)) if isinstance(v, (dict, list)) else v == float("inf") or v == -float("inf")
        if floats(value): raise Bad
    json.dumps(value, ensure_ascii=False).encode()
    return value


def _row(value):
    if isinstance(value, list) and value and all(isinstance(m, dict) and "role" in m for m in value): return {"messages": value}
    if not isinstance(value, dict): raise Bad
    return value


def judge_jsonl(data):
    return [_row(_strict(line)) for line in data.decode("utf-8-sig").split("\n") if line.strip(" \t\r")]


def judge_json(data):
    text = data.decode("utf-8-sig").strip(" \t\r\n")
    if text.startswith("["):
        return [_row(v) for v in _strict(text)]
    rows, at = [], 0
    while at < len(text):
        _, end = json.JSONDecoder().raw_decode(text, at)
        rows.append(_row(_strict(text[at:end])))
        at = end + len(text[end:]) - len(text[end:].lstrip(" \t\r\n"))
    return rows


def judge_csv(data):
    text = data.decode("utf-8-sig")
    if "\0" in text: raise Bad
    header, *rows = [r for r in csv.reader(io.StringIO(text, newline=""), strict=True) if r]
    if len(set(header)) < len(header) or any(c != c.strip() or not c for c in header) or any(len(r) != len(header) for r in rows): raise Bad
    if len(header) == 1 and any(c in header[0] for c in ";\t|"): raise Bad
    return [dict(zip(header, r)) for r in rows]


JUDGES = {"f.jsonl": judge_jsonl, "f.json": judge_json, "f.csv": judge_csv}
ROWS = [{"prompt": "2+2?", "completion": "4"}, {"prompt": "ყველა 😀", "completion": "a\nb"}, {"prompt": "x, \"y\"", "completion": ""}, {"prompt": "n", "completion": "1.5e3"}]


def _files():
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ["prompt", "completion"])
    writer.writeheader()
    writer.writerows(ROWS)
    mixed = ROWS + [{"n": 1.5, "deep": [{"k": None}], "prompt": "\u2028 \x7f"}, [{"role": "user", "content": "Hi"}]]
    return {"f.jsonl": ["".join(json.dumps(r, ensure_ascii=a) + "\n" for r in mixed).encode() for a in (True, False)] + [("\ufeff" + GOOD_LINES).encode()],
            "f.json": [json.dumps(mixed, ensure_ascii=False, indent=i).encode() for i in (None, 1)] + [GOOD_LINES.encode()],
            "f.csv": [out.getvalue().encode(), out.getvalue().replace("\r\n", "\n").encode()]}


FILES = _files()
PIECES = [b"NaN", b"Infinity", b'"', b"\n", b"\r\n", b"\r", b"\n\n", b"{", b"}", b"[", b"]", b",", b"\\ud83d", b"\\ude00", b"\\", b"\0", b"\xff", b"\xef\xbb\xbf",
          b"1e999", b"null", b"7", b" ", b"\xed\xa0\x80", b"\xe2\x80\xa8", b'"prompt": 1, ', b";", "é".encode("latin-1"), b"\x1f\x8b", b"PK\x03\x04"]


@st.composite
def mutations(draw):
    "A kind of file and its bytes after one to four changes."
    name = draw(st.sampled_from(list(FILES)))
    data = draw(st.sampled_from(FILES[name]))
    for _ in range(draw(st.integers(1, 4))):
        i, j = sorted((draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))))
        kind = draw(st.sampled_from(["flip", "byte", "piece", "cut", "delete", "double", "lines", "swap"]))
        if kind == "flip" and i < len(data): data = data[:i] + bytes([data[i] ^ (1 << draw(st.integers(0, 7)))]) + data[i+1:]
        if kind == "byte": data = data[:i] + bytes([draw(st.integers(0, 255))]) + data[i:]
        if kind == "piece": data = data[:i] + draw(st.sampled_from(PIECES)) + data[i:]
        if kind == "cut": data = data[:j]
        if kind == "delete": data = data[:i] + data[min(j, i + draw(st.integers(1, 9))):]
        if kind == "double": data = data[:j] + data[i:j] + data[j:]
        if kind == "swap": data = data[j:] + data[i:j] + data[:i]
        if kind == "lines":
            lines = data.splitlines(keepends=True)
            random.Random(i).shuffle(lines)
            data = b"".join(lines)
    return name, data


SIGNS = (b"\x1f\x8b", b"PK\x03\x04", b"\xff\xfe", b"\xfe\xff")


@settings(max_examples=1000, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(mutations(), st.booleans())
def test_mutated_files(case, packed):
    name, data = case
    with tempfile.TemporaryDirectory() as folder:
        path = put(folder, name + ".gz" * packed, data)
        try: rows = read_rows(path)
        except DataError as e:
            rows = None
            assert e.problems and str(e)
    try: expected = JUDGES[name](data) if b"\0" not in data[:1024] and not data.startswith(SIGNS) else None
    except (Bad, ValueError, RecursionError, csv.Error): expected = None
    if name == "f.csv" and rows is None and re.search(b"\r(?!\n)", data): return  # a lone carriage return may be a line end of old: told, not guessed
    assert rows == (expected or None), (name, data)


@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 7)), min_size=1, max_size=3), st.sampled_from(["p.parquet", "p.parquet.gz", "l.jsonl.gz"]))
def test_mutated_binary_files(flips, name):
    "Packed data have a checksum; a Parquet file has none on its texts, so there only the number of rows and the kind of error are certain."
    import pyarrow as pa, pyarrow.parquet as pq
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        if name.startswith("l"): whole = gzip.compress(GOOD_LINES.encode())
        else:
            sink = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(ROWS), sink)
            whole = gzip.compress(sink.getvalue()) if name.endswith(".gz") else sink.getvalue()
        data = bytearray(whole)
        for at, bit in flips: data[at % len(data)] ^= 1 << bit
        path.write_bytes(data)
        try: rows = read_rows(path)
        except DataError: return
        assert rows == (GOOD if name.startswith("l") else ROWS) or name == "p.parquet" and len(rows) == len(ROWS)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters(codec="utf-8")),
    lambda c: st.lists(c, max_size=3) | st.dictionaries(st.text(max_size=3), c, max_size=3), max_leaves=6), max_size=4), min_size=1, max_size=6), st.booleans())
def test_whatever_json_writes_is_read(rows, ascii_only):
    try: text = [json.dumps(r, ensure_ascii=ascii_only) for r in rows]; "".join(text).encode(); json.dumps(rows, ensure_ascii=False).encode()
    except UnicodeEncodeError: return
    with tempfile.TemporaryDirectory() as folder:
        assert read_rows(put(folder, "a.jsonl", "\n".join(text))) == rows
        assert read_rows(put(folder, "a.json", "[" + ",\n".join(text) + "]")) == rows
        assert read_rows(put(folder, "b.json", "".join(text))) == rows


def test_imports_only_the_standard_library():
    import subprocess, sys
    heavy = "import sys; import ftcourse.data.reading, ftcourse.data.formats; print(sorted({'torch', 'transformers', 'datasets', 'numpy', 'pyarrow', 'pandas'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, cwd=Path(__file__).resolve().parent.parent)
    assert out.stdout.strip() == "[]", out.stderr
