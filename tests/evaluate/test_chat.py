"""A conversation gives the answers that evaluation would see, whole characters at a time, and can be kept."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bigtune.data.conversation import Message
from bigtune.errors import DataError
from bigtune.evaluate.chat import Chat, Sampling, _Stream
from bigtune.evaluate.generate import generate
from bigtune.evaluate.load import Loaded, load, stop_ids

SHORT = Sampling(max_new_tokens=12)


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> Loaded:
    return load(model_folder, "float32")


def ask(chat: Chat, text: str) -> tuple[str, list[str]]:
    pieces: list[str] = []
    return chat.ask(text, pieces.append), pieces


def test_an_answer_is_the_one_that_evaluation_sees(loaded: Loaded) -> None:
    chat = Chat(loaded, SHORT)
    ids = chat.format.prompt_ids([Message("user", "how many eggs")])
    [expected] = generate(
        loaded.model, loaded.tokenizer, [ids], stop_ids=stop_ids(loaded, []), max_new_tokens=12, batch_size=1
    )
    said, pieces = ask(chat, "how many eggs")
    assert said.strip() == expected.text and "".join(pieces) == said and len(pieces) > 1


def test_what_was_said_is_a_part_of_the_next_prompt_until_it_is_forgotten(loaded: Loaded) -> None:
    chat = Chat(loaded, SHORT, system="answer")
    first, _ = ask(chat, "how many")
    second, _ = ask(chat, "how many")
    assert [turn.role for turn in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    chat.reset()
    assert ask(chat, "how many")[0] == first != second
    chat.reset("")
    assert chat.messages == []


def test_sampling_is_by_seed(loaded: Loaded) -> None:
    warm = Sampling(temperature=1.5, max_new_tokens=12)
    answers = [ask(Chat(loaded, warm, seed=seed), "how many")[0] for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_a_character_of_several_tokens_is_shown_when_it_is_whole(tokenizer: Any) -> None:
    pieces: list[str] = []
    stream = _Stream(tokenizer, set(), pieces.append)
    stream.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in tokenizer("né€").input_ids:
        stream.put(torch.tensor([token]))
    stream.end()
    assert pieces == ["n", "é", "€"]


def test_one_that_has_outgrown_the_context_is_told(loaded: Loaded) -> None:
    with pytest.raises(DataError, match="the model's context is 256; /reset begins anew"):
        ask(Chat(loaded, SHORT), "how many eggs " * 100)


def run(model: Path, *options: str, lines: str = "") -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "bigtune.cli", "chat", str(model), "--max-new-tokens", "8", *options]
    return subprocess.run(command, input=lines, capture_output=True, text=True, check=False)


def test_one_answer_alone_is_printed(model_folder: Path, loaded: Loaded) -> None:
    done = run(model_folder, "--prompt", "how many eggs")
    assert done.returncode == 0 and done.stdout.strip()
    assert done.stdout.strip() == ask(Chat(loaded, Sampling(max_new_tokens=8)), "how many eggs")[0].strip()


def test_a_conversation_in_a_terminal(model_folder: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    done = run(model_folder, lines=f"how many\n/save {kept}\n/reset\n/save {tmp_path}/no/where\n/nonsense\n/quit\n")
    assert done.returncode == 0
    [row] = map(json.loads, kept.read_text().splitlines())
    assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
    assert "2 turns are in" in done.stderr and "forgotten" in done.stderr and "/system TEXT" in done.stderr
    assert f"Error: {tmp_path}/no/where: cannot be written: No such file" in done.stderr


def test_what_is_no_model_is_one_line(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: {tmp_path}: no model is here") and len(done.stderr.splitlines()) == 1
