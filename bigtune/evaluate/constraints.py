"""Whether an answer does what can be verified of its instruction: length, format, keywords.

Rows name constraints as those of IFEval do (https://arxiv.org/abs/2311.07911): `instruction_id_list`, and `kwargs`, an
object for each. `language:response_language` is left to the harness, which has a detector of languages.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[..., bool]
_SENTENCE = re.compile(r"[^.!?]*[^.!?\s][^.!?]*(?:[.!?]+[\"')\]]*(?=\s|$)|\Z)", re.DOTALL)
_CHOICES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def followed(output: str, reference: str, row: Mapping[str, Any]) -> float:
    """1 where an answer meets every constraint of its row (IFEval's strict accuracy by prompt).

    Raises:
        ValueError: the row has no constraints, or one that is not known.
    """
    return float(all(_checked(output, row)))


def followed_share(output: str, reference: str, row: Mapping[str, Any]) -> float:
    """The share of a row's constraints that an answer meets.

    Raises:
        ValueError: the row has no constraints, or one that is not known.
    """
    found = _checked(output, row)
    return sum(found) / len(found)


def _checked(output: str, row: Mapping[str, Any]) -> list[bool]:
    names, settings = row.get("instruction_id_list"), row.get("kwargs")
    if not (isinstance(names, list) and isinstance(settings, list) and names and len(names) == len(settings)):
        raise ValueError("the row has no instruction_id_list with as many kwargs")
    found = []
    for name, given in zip(names, settings, strict=True):
        check = CHECKS.get(name)
        if check is None:
            raise ValueError(f"'{name}' is no constraint that is known here")
        try:
            found.append(bool(output.strip()) and check(output, **{k: v for k, v in given.items() if v is not None}))
        except TypeError as error:
            raise ValueError(f"kwargs of '{name}': {error}") from None
    return found


def _compared(count: int, relation: str, wanted: int) -> bool:
    if relation not in ("at least", "less than"):
        raise ValueError(f"relation '{relation}' is neither 'at least' nor 'less than'")
    return count >= wanted if relation == "at least" else count < wanted


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text, re.IGNORECASE))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def _existence(text: str, keywords: list[str]) -> bool:
    return all(_count(re.escape(word), text) for word in keywords)


def _frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _compared(_count(re.escape(keyword), text), relation, frequency)


def _forbidden(text: str, forbidden_words: list[str]) -> bool:
    return not any(_count(rf"\b{re.escape(word)}\b", text) for word in forbidden_words)


def _letters(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compared(text.casefold().count(letter.casefold()), let_relation, let_frequency)


def _number_of_words(text: str, num_words: int, relation: str) -> bool:
    return _compared(len(_words(text)), relation, num_words)


def _sentences(text: str, num_sentences: int, relation: str) -> bool:
    return _compared(len(_SENTENCE.findall(text)), relation, num_sentences)


def _paragraphs(text: str, num_paragraphs: int) -> bool:
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text.strip())]
    inner = parts[1:-1]
    return all(inner) and sum(map(bool, parts)) == num_paragraphs


def _first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = [part.strip() for part in text.split("\n\n") if part.strip()]
    if len(parts) != num_paragraphs or nth_paragraph > num_paragraphs:
        return False
    words = _words(parts[nth_paragraph - 1])
    return bool(words) and words[0].casefold() == first_word.casefold()


def _postscript(text: str, postscript_marker: str) -> bool:
    return bool(re.search(rf"^\s*{re.escape(postscript_marker)}.+", text, re.IGNORECASE | re.MULTILINE))


def _placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[[^\]]+\]", text)) >= num_placeholders


def _bullets(text: str, num_bullets: int) -> bool:
    return len(re.findall(r"^\s*(?:\*(?!\*)|-)\s*\S", text, re.MULTILINE)) == num_bullets


def _title(text: str) -> bool:
    return any(found.strip() for found in re.findall(r"<<([^\n]+)>>", text))


def _constrained(text: str) -> bool:
    return any(choice in text for choice in _CHOICES)


def _highlights(text: str, num_highlights: int) -> bool:
    found = re.findall(r"\*\*([^\n*]+)\*\*|\*([^\n*]+)\*", text)
    return sum(bool("".join(pair).strip()) for pair in found) >= num_highlights


def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"\s?{re.escape(section_spliter)}\s?\d+\s?", text)) >= num_sections


def _json(text: str) -> bool:
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text.strip(), re.DOTALL | re.IGNORECASE)
    try:
        json.loads(fenced[1] if fenced else text)
    except ValueError:
        return False
    return True


def _repeats(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().casefold().startswith(prompt_to_repeat.strip().casefold())


def _two(text: str) -> bool:
    parts = [part.strip() for part in text.split("******")]
    return len(list(filter(None, parts))) == 2 and len(set(filter(None, parts))) == 2 and all(parts[1:-1])


def _capitals(text: str, capital_frequency: int, capital_relation: str) -> bool:
    return _compared(sum(word.isupper() for word in _words(text)), capital_relation, capital_frequency)


def _ends(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').casefold().endswith(end_phrase.strip().casefold())


def _quoted(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


CHECKS: Mapping[str, Check] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letters,
    "length_constraints:number_words": _number_of_words,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:postscript": _postscript,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:title": _title,
    "detectable_format:constrained_response": _constrained,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "combination:repeat_prompt": _repeats,
    "combination:two_responses": _two,
    "change_case:english_capital": str.isupper,
    "change_case:english_lowercase": str.islower,
    "change_case:capital_word_frequency": _capitals,
    "startend:end_checker": _ends,
    "startend:quotation": _quoted,
    "punctuation:no_comma": lambda text: "," not in text,
}
