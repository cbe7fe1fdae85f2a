"""Text of others for a terminal or a page."""

_SHOWN = {
    **{code: chr(0x2400 + code) for code in range(0x20)},  # pictures of control characters
    0x7F: "␡",
    **{code: f"⟨{code:X}⟩" for code in (*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))},
    ord("\n"): "↵\n",
    ord("\t"): "⇥\t",
    ord("\r"): "␍",
}


def visible(text: str) -> str:
    """A text with its line breaks marked, and without what would upset a terminal or turn the direction of writing."""
    return text.translate(_SHOWN)
