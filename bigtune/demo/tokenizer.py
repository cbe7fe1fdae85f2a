"""The demo's tokenizer: byte-level BPE, trained on the demo's own text.

A word takes its space along behind it ("The ", "capital ", "Mibu", "."), unlike GPT-2's, whose words take
the space before them: so a name in a list or at a sentence's end is the same token as the name that an
answer begins with, and a small model need not learn each name twice. Decoding gives back every text.
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

EOS, PAD = "<eos>", "<pad>"
TEMPLATE = "### Instruction:\n\n\n### Response:\n"
_PIECES = r"\d{1,2}|\p{L}+|, |#+|\n+|[^\p{L}\d\s]|\s+"


def train_tokenizer(texts: Iterable[str], path: Path, vocabulary: int = 1792) -> PreTrainedTokenizerFast:
    """Train a tokenizer, save it under `path`, and return it. It has no chat template of its own."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([*texts, TEMPLATE], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=PAD)
    tokenizer.save_pretrained(path)
    return tokenizer
