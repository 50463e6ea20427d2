"""Whether a model writes on a GPU what it writes on a CPU: greedy texts, token by token.

    python -m benchmarks.speed.same_text --model MODEL --write texts.json       on a CPU
    python -m benchmarks.speed.same_text --model MODEL --compare texts.json     on a GPU

The CPU's texts come with the difference of the two largest logits before each token, in f32. Where a GPU's
text departs from one, that difference tells a rounding from a mistake: what follows is another text.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from svsk_jax.models import load_model, open_model
from svsk_jax.runtime import TextGenerator, encode_chat, generate_batch

QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Write a Python function that reverses a list.",
    "Explain why the sky is blue.",
    "Tell a short story about a lighthouse.",
)
TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--compare", type=Path)
    flags = parser.parse_args()
    source = open_model(flags.model)
    tokenizer = source.tokenizer()
    model = load_model(source, weights="packed")
    generator = TextGenerator(model, tokenizer, capacity=256)
    prompts = [encode_chat(tokenizer, [{"role": "user", "content": each}]) for each in QUESTIONS]
    if flags.write:
        logits = jax.jit(lambda model, tokens: model(tokens))
        texts = []
        for prompt in prompts:
            ids = list(generator.generate(prompt, max_tokens=TOKENS).token_ids)
            found = logits(model, jnp.asarray([prompt + ids], jnp.int32))[0, len(prompt) - 1 : -1]
            best = np.sort(np.asarray(found), axis=-1)[:, -2:]
            texts.append({"prompt": prompt, "ids": ids, "margins": (best[:, 1] - best[:, 0]).tolist()})
            print(tokenizer.decode(ids)[:100])
        flags.write.write_text(json.dumps(texts), encoding="utf-8")
        return
    print(f"{jax.devices()[0].device_kind}, fused step: {generator.fused}")
    texts = json.loads(flags.compare.read_text(encoding="utf-8"))
    together = generate_batch(generator, prompts, max_tokens=TOKENS)
    for text, prompt, batched in zip(texts, prompts, together, strict=True):
        assert text["prompt"] == prompt
        alone = generator.generate(prompt, max_tokens=TOKENS)
        for name, result in (("alone", alone), ("in a batch", batched)):
            pairs = zip(text["ids"], result.token_ids, strict=False)
            first = next((i for i, (a, b) in enumerate(pairs) if a != b), len(text["ids"]))
            departs = (
                "the same to the end"
                if first == len(text["ids"])
                else f"departs where the two best logits of the CPU differ by {text['margins'][first]:.3f}"
            )
            print(f"{name}: {first} of {len(text['ids'])} tokens equal, {departs}")
        print(f"  {alone.tokens_per_second:.0f} tok/s; {alone.text[:70]!r}", flush=True)


if __name__ == "__main__":
    main()
