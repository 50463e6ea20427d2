import copy

import pytest

from svsk_jax.runtime import chat, encode_chat, encode_prompt, stop_ids


def test_the_template_is_rendered_up_to_the_assistant(tokenizer):
    ids = encode_chat(tokenizer, [{"role": "user", "content": "hé"}])
    assert all(type(i) is int for i in ids)
    assert tokenizer.decode(ids) == "<user>hé<end><assistant>"
    assert (ids[0], ids[-1]) == (257, 258)


def test_template_options_reach_the_template(tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = "{{ messages[0].content }}{{ '!' if loud }}"
    messages = [{"role": "user", "content": "hi"}]
    assert plain.decode(encode_chat(plain, messages, loud=True)) == "hi!"
    assert plain.decode(encode_chat(plain, messages)) == "hi"


def test_a_refusing_template_is_a_mistake_of_the_user(tokenizer):
    messages = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]
    with pytest.raises(ValueError, match="refused the messages: the system speaks first"):
        encode_chat(tokenizer, messages)


def test_without_a_template_contents_are_a_raw_prompt(tokenizer):
    base = copy.deepcopy(tokenizer)
    base.chat_template = None
    messages = [{"role": "system", "content": "one"}, {"role": "user", "content": "two"}]
    assert encode_chat(base, messages) == encode_prompt(base, "one\ntwo")
    assert base.decode(encode_chat(base, messages)) == "one\ntwo"


@pytest.mark.parametrize(
    ("declared", "expected"),
    [({}, {256}), ({"eos_token_id": 7}, {7, 256}), ({"eos_token_id": [7, 8]}, {7, 8, 256})],
)
def test_stop_ids_join_both_sources(tokenizer, declared, expected):
    assert stop_ids(declared, tokenizer) == expected


def test_a_conversation(generator):
    said = iter(["hi", "  ", "x" * 200, "you", "/reset", "again", "/exit", "never"])
    shown, results = [], []
    messages = chat(
        generator,
        ask=lambda: next(said),
        show=shown.append,
        system="be brief",
        max_tokens=6,
        on_result=results.append,
    )
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert messages[1]["content"] == "again"
    assert messages[2]["content"] == results[-1].text
    assert next(said) == "never"
    assert len(results) == 3
    # The second answered question came with the first exchange before it, without the one that did not fit.
    first, second, third = (result.prompt_tokens for result in results)
    assert first == len("be brief") + 1 + 1 + len("hi") + 2
    assert second > first + len("you")
    assert third == first + len("again") - len("hi")
    assert any("prompt has" in piece and "/reset" in piece for piece in shown)


def test_the_end_of_input_ends_the_conversation(generator):
    assert chat(generator, ask=lambda: None, show=print) == []
