from typing import Any

import pytest

from bigtune.evaluate.generate import Output, generate

TEXTS = [
    "how many eggs are left",
    "a",
    "the name of a colour is blue red 12 7 how many",
    "is",
    "red\n\nblue",
    "of a",
]


@pytest.fixture
def prompts(tokenizer: Any) -> list[list[int]]:
    return [tokenizer(text)["input_ids"] for text in TEXTS]


def answers(model: Any, tokenizer: Any, prompts: list[list[int]], **settings: Any) -> list[Output]:
    defaults: dict[str, Any] = {"stop_ids": {tokenizer.eos_token_id}, "max_new_tokens": 24, "batch_size": 4}
    return generate(model, tokenizer, prompts, **(defaults | settings))


def test_batched_answers_are_those_of_one_prompt_at_a_time(
    model: Any, tokenizer: Any, prompts: list[list[int]]
) -> None:
    alone = [answers(model, tokenizer, [prompt])[0] for prompt in prompts]
    assert answers(model, tokenizer, prompts) == alone
    assert len({output.text for output in alone}) > 3


def test_an_answer_ends_before_the_stop_token(model: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    free = model.generate(
        **tokenizer(TEXTS[0], return_tensors="pt", return_token_type_ids=False),
        do_sample=False,
        max_new_tokens=24,
    )[0, len(prompts[0]) :].tolist()
    stop = free[5]
    first = free.index(stop)
    batched = answers(model, tokenizer, prompts, stop_ids={stop})[0]
    assert batched.tokens == first + 1
    assert batched.text == tokenizer.decode(free[:first], skip_special_tokens=True).strip()


def test_a_plain_answer_ends_before_the_stop_text(model: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    whole = answers(model, tokenizer, prompts, stop_ids=())
    stop = whole[0].text[6:8]
    cut = answers(model, tokenizer, prompts, stop_ids=(), stop_text=stop)
    assert cut[0].tokens < whole[0].tokens
    for short, long in zip(cut, whole, strict=True):
        assert stop not in short.text
        assert long.text.startswith(short.text)
    assert cut == [answers(model, tokenizer, [p], stop_ids=(), stop_text=stop)[0] for p in prompts]


def test_sampling_settings_of_the_model_folder_are_not_used(
    model: Any, tokenizer: Any, prompts: list[list[int]]
) -> None:
    greedy = answers(model, tokenizer, prompts)
    own = model.generation_config
    own.update(do_sample=True, temperature=5.0, repetition_penalty=3.0)
    try:
        assert answers(model, tokenizer, prompts) == greedy
        assert model.generation_config is own
    finally:
        own.update(do_sample=False, temperature=1.0, repetition_penalty=1.0)
