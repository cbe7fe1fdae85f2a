"""A user names files, globs, folders or data sets; what is read is the same everywhere, and nothing goes unsaid."""

import gzip
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from bigtune.config import Source
from bigtune.data import hub
from bigtune.data.files import read_chunks
from bigtune.data.formats import read_conversations
from bigtune.data.sources import SourceFile, UnreadableFile, hash_of, resolve_sources, stat_of
from bigtune.errors import DataError
from tests.data import containers

ROWS = [{"question": f"{i}?", "answer": f"{i}!"} for i in range(7)]
LINE = b'{"text": "a"}\n'


def names(path: Path | str, root: Path, **more: Any) -> list[str]:
    files, _ = resolve_sources([Source(path=Path(path), **more)])
    return [str(Path(file.path).relative_to(root)) for file in files]


def filled(root: Path, *files: str) -> Path:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(LINE)
    return root


def refusal(source: Source) -> str:
    with pytest.raises(DataError) as caught:
        resolve_sources([source])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_gives_its_known_files_sorted_and_names_those_it_passes_over(tmp_path: Path) -> None:
    filled(tmp_path, "b.jsonl", "a/z.json", "a/c.txt.gz", "README.md", ".hidden.jsonl", ".git/x.json", "a/state.json")
    files, ignored = resolve_sources([Source(path=tmp_path)])
    assert [file.path for file in files] == [str(tmp_path / name) for name in ("a/c.txt.gz", "a/z.json", "b.jsonl")]
    assert sorted(ignored) == [str(tmp_path / name) for name in ("README.md", "a/state.json")]


def test_sources_keep_their_order_and_every_file_knows_its_own(tmp_path: Path) -> None:
    filled(tmp_path, "b.jsonl", "a.jsonl")
    files, _ = resolve_sources([Source(path=tmp_path / "b.jsonl"), Source(path=tmp_path)])
    assert [(file.source, Path(file.path).name) for file in files] == [(0, "b.jsonl"), (1, "a.jsonl"), (1, "b.jsonl")]


def test_a_glob_gives_each_match_once_in_order(tmp_path: Path) -> None:
    filled(tmp_path, "d/part-1", "d/part-0", "d/e/part-2", "d/other")
    assert names(tmp_path / "d/part-*", tmp_path) == ["d/part-0", "d/part-1"]
    assert names(tmp_path / "**/part-*", tmp_path) == ["d/e/part-2", "d/part-0", "d/part-1"]
    assert names(tmp_path / "**", tmp_path) == ["d/e/part-2", "d/other", "d/part-0", "d/part-1"]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    filled(tmp_path, "a[1].jsonl", "a1.jsonl")
    assert names(tmp_path / "a[1].jsonl", tmp_path) == ["a[1].jsonl"]


def test_a_folder_named_like_a_file_is_read_as_a_folder_by_name_and_by_glob(tmp_path: Path) -> None:
    filled(tmp_path, "x.jsonl/part.jsonl", "y.jsonl")
    assert names(tmp_path / "x.jsonl", tmp_path) == ["x.jsonl/part.jsonl"]
    assert names(tmp_path / "*.jsonl", tmp_path) == ["x.jsonl/part.jsonl", "y.jsonl"]


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    filled(tmp_path, "data/a.jsonl", "elsewhere/b.jsonl")
    (tmp_path / "data/circle").symlink_to(tmp_path / "data")
    (tmp_path / "data/more").symlink_to(tmp_path / "elsewhere")
    assert names(tmp_path / "data", tmp_path) == ["data/a.jsonl", "data/more/b.jsonl"]


def test_nothing_to_read_is_said_with_the_place_and_the_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(Source(path=Path("gone.jsonl"))).startswith(f"{tmp_path}/gone.jsonl: no such file")
    assert "*.jsonl: the pattern matches no file" in refusal(Source(path=Path("*.jsonl")))
    filled(tmp_path, "docs/README.md")
    assert "no file to read here (1 of other kinds); known are .jsonl" in refusal(Source(path=Path("docs")))
    assert "split" in refusal(Source(path=filled(tmp_path, "a.jsonl") / "a.jsonl", split="train"))
    assert "cannot be read (File name too long)" in refusal(Source(path=Path("a" * 300)))


def test_fields_and_roles_that_bigtune_does_not_know_are_refused_before_reading(tmp_path: Path) -> None:
    path = filled(tmp_path, "a.jsonl") / "a.jsonl"
    assert "'instrution' is no key of a known format" in refusal(Source(path=path, fields={"instrution": "q"}))
    assert "'Bob' is 'human'; allowed: system, user" in refusal(Source(path=path, roles={"Bob": "human"}))


def test_a_pipe_is_passed_over_and_named_since_opening_it_would_wait_for_ever(tmp_path: Path) -> None:
    filled(tmp_path, "a.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    files, ignored = resolve_sources([Source(path=tmp_path)])
    assert (len(files), ignored) == (1, [str(tmp_path / "pipe.jsonl")])
    assert "no file to read" in refusal(Source(path=tmp_path / "pipe.jsonl"))


@pytest.mark.parametrize(
    "name", ["*.jsonl", pytest.param("", id="folder"), pytest.param("gone.jsonl", id="by its own name")]
)
def test_an_unreadable_file_is_listed_and_then_named_by_whoever_reads_it(tmp_path: Path, name: str) -> None:
    filled(tmp_path, "a.jsonl")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    files, _ = resolve_sources([Source(path=tmp_path / name)])
    broken = files[-1]
    for ask in (stat_of, hash_of, lambda file: list(read_chunks(file, 100))):
        with pytest.raises(UnreadableFile, match=r"^\S+/gone.jsonl: cannot be read \(No such file or directory\)"):
            ask(broken)


def test_a_file_that_links_lead_to_again_is_read_once(tmp_path: Path) -> None:
    filled(tmp_path, "a.jsonl")
    (tmp_path / "again.jsonl").symlink_to("a.jsonl")
    (tmp_path / "round").symlink_to(".")
    for path in (tmp_path, tmp_path / "*.jsonl", tmp_path / "**" / "*.jsonl"):
        files, ignored = resolve_sources([Source(path=path)])
        assert [file.path for file in files] == [str(tmp_path / "a.jsonl")]
        assert str(tmp_path / "again.jsonl") in ignored


def test_a_name_that_is_not_utf8_is_one_line(tmp_path: Path) -> None:
    filled(tmp_path, "a.jsonl")
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl")
    Path(name).write_bytes((tmp_path / "a.jsonl").read_bytes())
    message = refusal(Source(path=tmp_path))
    assert "the file's name is not UTF-8; rename it" in message
    message.encode()  # it can be printed


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_forbidden_file_is_named(tmp_path: Path) -> None:
    path = filled(tmp_path, "a.jsonl") / "a.jsonl"
    path.chmod(0)
    with pytest.raises(UnreadableFile, match="Permission denied"):
        hash_of(resolve_sources([Source(path=path)])[0][0])


def test_what_a_file_is_comes_from_its_content_where_the_name_says_nothing(tmp_path: Path) -> None:
    for name, content in {
        "a": LINE,
        "b": b"\xef\xbb\xbf \n [1]",
        "c": containers.parquet(ROWS),
        "d": containers.arrow(ROWS),
        "e": gzip.compress(b"[]"),
        "f.jsonl": b"[]",
        "g.csv.gz": b"a,b\n",
        "h.txt": containers.zstd(b"[]"),
        "i": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
    files, _ = resolve_sources([Source(path=tmp_path / "*")])
    assert [(file.kind, file.compression) for file in files] == [
        ("jsonl", None),
        ("json", None),
        ("parquet", None),
        ("arrow", None),
        ("json", "gzip"),
        ("json", None),
        ("csv", None),
        ("text", "zstd"),
        ("jsonl", None),
    ]


def test_the_hash_follows_the_content_not_the_place(tmp_path: Path) -> None:
    filled(tmp_path, "a.jsonl", "b/c.jsonl")
    (tmp_path / "d.jsonl").write_bytes(LINE + b"\n")
    a, c, d = resolve_sources([Source(path=tmp_path)])[0]
    assert hash_of(a) == hash_of(c) != hash_of(d)
    assert stat_of(a) != stat_of(d)
    before = stat_of(a)
    os.utime(a.path, ns=(1, 1))
    assert before != stat_of(a) == [len(LINE), 1]


def test_a_saved_data_set_is_read_without_the_files_beside_its_rows(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_list(ROWS).shuffle(seed=1).select(range(5))  # an order that the files must show
    saved.save_to_disk(tmp_path / "saved", num_shards=2)
    said = [c.messages[0].content for c in read_conversations([Source(path=tmp_path / "saved")], "error")]
    assert said == saved["question"]
    # The same inside a folder of other things.
    filled(tmp_path, "zzz.jsonl")
    assert len(names(tmp_path, tmp_path)) == 3


def test_a_saved_data_set_with_splits_asks_for_one_and_lists_them(tmp_path: Path) -> None:
    one, two = datasets.Dataset.from_list(ROWS[:2]), datasets.Dataset.from_list(ROWS[2:])
    datasets.DatasetDict(train=one, test=two).save_to_disk(tmp_path / "two")
    assert "has several splits; set the source's split to one of train, test" in refusal(Source(path=tmp_path / "two"))
    assert "has no split 'dev'; set" in refusal(Source(path=tmp_path / "two", split="dev"))
    assert len(list(read_conversations([Source(path=tmp_path / "two", split="test")], "error"))) == 5
    datasets.DatasetDict(train=one).save_to_disk(tmp_path / "one")
    assert len(list(read_conversations([Source(path=tmp_path / "one")], "error"))) == 2
    one.save_to_disk(tmp_path / "plain")
    assert "a data set without splits; leave" in refusal(Source(path=tmp_path / "plain", split="train"))


def test_a_broken_state_of_a_saved_data_set_is_one_line(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path)
    (tmp_path / "state.json").write_text('{"_split": null, "_data_files": [3]}')
    assert "state.json: not what `save_to_disk` writes" in refusal(Source(path=tmp_path))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub.load.cache_clear()


@pytest.mark.usefixtures("own_cache")
def test_a_data_set_by_name_reads_like_a_file_and_has_a_fingerprint(tmp_path: Path) -> None:
    folder = tmp_path / "named"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(containers.jsonl(ROWS))
    source = Source(dataset=str(folder))
    [file], _ = resolve_sources([source])
    assert (file.kind, file.split, file.path) == ("dataset", "train", f"dataset {folder} (train)")
    assert stat_of(file) is None and hash_of(file) == hash_of(file)
    read = list(read_conversations([source], "error"))
    assert [c.messages[0].content for c in read] == [row["question"] for row in ROWS]
    assert [c.where for c in read][-1] == f"dataset {folder} (train), row 7"
    (folder / "test.jsonl").write_bytes(containers.jsonl(ROWS))
    hub.load.cache_clear()
    assert "has several splits; set the source's split to one of" in refusal(source)
    assert "cannot be loaded (Unknown split" in refusal(Source(dataset=str(folder), split="dev"))


@pytest.mark.usefixtures("own_cache")
def test_a_data_set_that_is_not_to_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'a/b' on the Hub\nlong tail")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    complaint = refusal(Source(dataset="a/b"))
    assert complaint.startswith("dataset a/b: cannot be loaded (Couldn't reach 'a/b' on the Hub)")
    assert "save_to_disk" in complaint


def test_finding_and_hashing_plain_files_imports_no_heavy_library(tmp_path: Path) -> None:
    filled(tmp_path, "a.jsonl", "b.parquet", "c.csv")
    code = (
        "import sys; from pathlib import Path; from bigtune.config import Source; from bigtune.data.sources import *;"
        f"files, _ = resolve_sources([Source(path=Path({str(tmp_path)!r}))]);"
        "[(stat_of(f), hash_of(f)) for f in files];"
        "print(sorted({'pyarrow', 'datasets', 'torch', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_source_file_can_be_a_key_and_travel_to_another_process() -> None:
    import pickle

    file = SourceFile(0, "a.jsonl", "jsonl")
    assert {pickle.loads(pickle.dumps(file)): 1}[file] == 1
