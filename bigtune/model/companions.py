"""The small files that make a model of its weights."""

from pathlib import Path

COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "vocab.*", "merges.txt", "tekken.json", "spiece.model", "*.py",
)  # fmt: skip


def companion_files(folder: Path) -> dict[str, Path]:
    """What makes a model of the weights, by name: config, generation config, tokenizer, chat template, and code
    of its own if it has any."""
    return {path.name: path for pattern in COMPANIONS for path in sorted(folder.glob(pattern)) if path.is_file()}
