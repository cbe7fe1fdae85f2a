"""A small Llama with fresh weights, for demos, tests and trials: `python -m bigtune.model.create --help`."""

import shutil
from pathlib import Path

import click

from bigtune.errors import BigtuneError, ModelError
from bigtune.progress import without_library_bars


def create_llama(
    tokenizer: Path,
    output: Path,
    hidden_size: int = 256,
    layers: int = 4,
    heads: int = 4,
    key_value_heads: int | None = None,
    intermediate_size: int | None = None,
    context: int = 4096,
    tied: bool = True,
    seed: int = 0,
    max_shard_size: str = "50MB",
) -> int:
    """Write a randomly initialised Llama as sharded float32 safetensors, with a tokenizer's files beside.

    Args:
        tokenizer: a folder with tokenizer.json and tokenizer_config.json, or a bare tokenizer.json.
        context: the most positions a sequence may have, in tokens.

    Returns:
        The number of parameters.

    Raises:
        ModelError: the tokenizer cannot be read, or the heads do not divide the width.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if hidden_size % heads:
        raise ModelError(f"--hidden-size {hidden_size} is no multiple of --heads {heads}")
    vocabulary = _tokenizer(tokenizer, output)
    config = LlamaConfig(
        vocab_size=-(-len(vocabulary) // 64) * 64,  # padded: matrix products like round sizes
        hidden_size=hidden_size,
        intermediate_size=intermediate_size or -(-hidden_size * 8 // 3 // 64) * 64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads or heads,
        max_position_embeddings=context,
        initializer_range=0.02 * (768 / hidden_size) ** 0.5,  # the usual 0.02 is that of GPT-2's width
        tie_word_embeddings=tied,
        bos_token_id=vocabulary.bos_token_id,
        eos_token_id=vocabulary.eos_token_id,
        pad_token_id=vocabulary.pad_token_id,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with without_library_bars():
        model.save_pretrained(output, max_shard_size=max_shard_size)
    return int(model.num_parameters())


def _tokenizer(path: Path, output: Path):  # type: ignore[no-untyped-def]
    """Put the tokenizer's files into the output folder, and load it from there."""
    from bigtune.data.chat import load_tokenizer

    output.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
            if (path / name).is_file():
                shutil.copyfile(path / name, output / name)
        if (path / "tokenizer_config.json").is_file():
            return load_tokenizer(output)
        path = path / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"{path.absolute()}: no tokenizer.json here")
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_file=str(path))
    specials = [token.content for token in bare.added_tokens_decoder.values() if token.special]
    end = next((token for token in specials if "end" in token or token == "</s>"), None)
    if end is None:
        raise ModelError(f"{path}: names no end-of-text token; give a folder with a tokenizer_config.json")
    bare.eos_token = end
    bare.pad_token = next((token for token in specials if "pad" in token), end)
    bare.save_pretrained(output)
    return load_tokenizer(output)


@click.command()
@click.option("--tokenizer", type=click.Path(path_type=Path), required=True, help="folder, or a tokenizer.json")
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--hidden-size", default=256, show_default=True)
@click.option("--layers", default=4, show_default=True)
@click.option("--heads", default=4, show_default=True)
@click.option("--context", default=4096, show_default=True, help="tokens")
@click.option("--seed", default=0, show_default=True)
def main(tokenizer: Path, output: Path, hidden_size: int, layers: int, heads: int, context: int, seed: int) -> None:
    """Create a small Llama with fresh weights."""
    try:
        count = create_llama(tokenizer, output, hidden_size, layers, heads, context=context, seed=seed)
    except BigtuneError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{output}: a Llama of {count:,} parameters")


if __name__ == "__main__":
    main()
