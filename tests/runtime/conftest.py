import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from svsk_jax.model import Decoder, ModelConfig
from svsk_jax.model.parameters import random_parameters
from svsk_jax.runtime import TextGenerator

END, USER, ASSISTANT = 256, 257, 258
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('the system speaks first') }}{% endif %}"
    "{{ '' if m.role == 'system' else '<' + m.role + '>' }}{{ m.content }}<end>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Every byte; <end>, <user> and <assistant> (special); and merges that cut multi-byte characters in odd
    places."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    vocabulary |= {"<end>": END, "<user>": USER, "<assistant>": ASSISTANT}
    # 😀 is F0 9F 98 80, written ð Ł ĺ Ģ in the byte alphabet; é is C3 A9.
    merges = [("ĺ", "Ģ"), ("Ģ", "Ã"), ("a", "b")]
    vocabulary |= {left + right: 259 + index for index, (left, right) in enumerate(merges)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>", "<user>", "<assistant>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", chat_template=TEMPLATE)


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    return ModelConfig(
        architecture="llama",
        vocab_size=262,
        hidden_size=48,
        intermediate_size=88,
        num_layers=1,
        num_heads=6,
        num_kv_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_position_embeddings=96,
        tie_word_embeddings=True,
    )


@pytest.fixture(scope="session")
def model(config) -> Decoder:
    return Decoder(config, random_parameters(config, 0))


@pytest.fixture(scope="session")
def generator(model, tokenizer) -> TextGenerator:
    """Without stop tokens, with the whole context of 96; shared, since each generator compiles anew."""
    return TextGenerator(model, tokenizer)
