"""Hostfiles and filters."""

from pathlib import Path

import pytest

from bigtune.errors import LaunchError
from bigtune.launch.hosts import Host, limit, read_hostfile, select

HOSTS = [Host("a", (0, 1)), Host("b", (0, 1, 2, 3)), Host("c-1.local", (0,))]


def write(folder: Path, text: str) -> Path:
    path = folder / "hosts"
    path.write_text(text)
    return path


def test_a_hostfile_as_deepspeed_has_them(tmp_path: Path) -> None:
    path = write(tmp_path, "# ours\na slots=2\n\nb   slots=4  # the large one\nc-1.local slots=1\n")
    assert read_hostfile(path) == HOSTS


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a slots=2\na slots=1\n", "line 2: a is on line 1 already"),
        ("a slots=0\n", "line 1: a has no slots"),
        ("a\n", "line 1: 'a'; write a host as: NAME slots=N"),
        ("a slots=two\n", "NAME slots=N"),
        ("a slots=2 gpus=3\n", "NAME slots=N"),
        ("-oProxyCommand=x slots=2\n", "no name of a host"),
        ("a;reboot slots=2\n", "no name of a host"),
        ("$(id) slots=2\n", "no name of a host"),
        ("# none\n", "names no host"),
        ("\x00\n", "NAME slots=N"),
    ],
)
def test_what_is_no_hostfile_is_told_by_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(LaunchError) as caught:
        read_hostfile(write(tmp_path, text))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_hostfile_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="cannot be read: No such file"):
        read_hostfile(tmp_path / "none")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(LaunchError, match="it is no text"):
        read_hostfile(tmp_path / "bytes")


def test_filters_choose_hosts_and_slots() -> None:
    assert select(HOSTS, None, None) == HOSTS
    assert select(HOSTS, "b:3,1@a", None) == [HOSTS[0], Host("b", (3, 1))]
    assert select(HOSTS, None, "b@a:0") == [Host("a", (1,)), HOSTS[2]]


@pytest.mark.parametrize(
    ("include", "exclude", "said"),
    [
        ("d", None, "no host 'd' (there are: a, b, c-1.local)"),
        ("a:2", None, "a has no slot 2"),
        ("a:x", None, "NAME:0,1"),
        ("a@a", None, "names a twice"),
        (None, "a@b@c-1.local", "leaves no host"),
        ("a", "b", "give one of them"),
    ],
)
def test_filters_that_name_what_is_not_there(include: str | None, exclude: str | None, said: str) -> None:
    with pytest.raises(LaunchError) as caught:
        select(HOSTS, include, exclude)
    assert said in str(caught.value)


def test_fewer_ranks_take_the_first_slots() -> None:
    assert limit(HOSTS, 3) == [HOSTS[0], Host("b", (0,))]
    assert limit(HOSTS, None) == HOSTS
    with pytest.raises(LaunchError, match="--ranks 8: the hosts have 7 slots"):
        limit(HOSTS, 8)
