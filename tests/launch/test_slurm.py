"""Scripts for sbatch; what Slurm itself does with them is tested in tests/cluster."""

import subprocess
from pathlib import Path

import pytest

from bigtune.errors import LaunchError
from bigtune.launch.slurm import Asked, render


def lines(asked: Asked, run_file: str = "run.yaml", arguments: tuple[str, ...] = ()) -> list[str]:
    script = render(asked, Path(run_file), arguments)
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    return script.splitlines()


def test_a_job_asks_for_what_was_asked_and_nothing_else() -> None:
    found = lines(Asked(nodes=4, partition="gpu", account="a1", time="12:00:00", gpus_per_node="h100:8"))
    for option in ("nodes=4", "ntasks-per-node=1", "partition=gpu", "account=a1", "time=12:00:00", "requeue"):
        assert f"#SBATCH --{option}" in found
    assert "#SBATCH --gpus-per-node=h100:8" in found and "#SBATCH --job-name=run" in found
    assert not any("exclusive" in line for line in found)
    assert not any("partition" in line for line in lines(Asked()))
    assert "#SBATCH --exclusive" in lines(Asked())
    assert "#SBATCH --qos=high" in lines(Asked(more=("--qos=high",)))


@pytest.mark.parametrize(
    ("time", "seconds"),
    [(None, 180), ("2", 30), ("10", 150), ("20", 180), ("1:30", 22), ("00:08:00", 120), ("1-0", 180), ("0-0:4", 60)],
)
def test_it_is_asked_to_save_well_before_its_time_is_up(time: str | None, seconds: int) -> None:
    assert f"#SBATCH --signal=B:TERM@{seconds}" in lines(Asked(time=time))


def test_paths_and_settings_are_words_to_the_shell() -> None:
    found = lines(Asked(), "/tmp/it's; $(touch x)/run.yaml", ("--set", "output=a b"))
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {found[-1].removeprefix('exec ')}"], capture_output=True,
                           text=True, check=True).stdout.splitlines()  # fmt: skip
    assert words[4:] == ["/tmp/it's; $(touch x)/run.yaml", "--slurm", "--set", "output=a b"]


@pytest.mark.parametrize("word", ["a b", "a'b", 'a"b', "a;b", "a\nb", "$(b)", "a`b`", ""])
def test_what_could_be_read_as_something_else_is_refused(word: str) -> None:
    for asked in (Asked(name=word), Asked(account=word), Asked(partition=word), Asked(time=word), Asked(more=(word,))):
        if asked.name == "":
            continue  # the run file's name then
        with pytest.raises(LaunchError):
            render(asked, Path("run.yaml"), ())
    with pytest.raises(LaunchError, match="give one option of sbatch"):
        render(Asked(more=("qos=high",)), Path("run.yaml"), ())
