"""spqt from Python, cell by cell: python docs/example.py FOLDER. A converted, calibrated folder, or a hub id.

Cells begin with `# %%`, so that editors run them one by one.
"""

# %% A model and its tokenizer, as mlx_lm.load returns them.
import sys

import mlx.core as mx
from mlx_lm import batch_generate, generate, stream_generate
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler

import spqt_cli

FOLDER = sys.argv[1] if len(sys.argv) > 1 else "my-model"
model, tokenizer = spqt_cli.load(FOLDER)


def tokens_of(question: str) -> list[int]:
    """Token ids of a question in the model's chat template."""
    return tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)


# %% An answer.
print(generate(model, tokenizer, tokens_of("Why is the sky blue?"), max_tokens=32))

# %% Token by token, with a sampler.
sampler = make_sampler(temp=0.7, top_p=0.9)
for piece in stream_generate(model, tokenizer, tokens_of("Name a colour."), max_tokens=16, sampler=sampler):
    print(piece.text, end="", flush=True)
print(f"\n{piece.generation_tps:.1f} tokens/s")

# %% Several prompts at once.
answers = batch_generate(model, tokenizer, [tokens_of("Red?"), tokens_of("Blue?")], max_tokens=8)
print(answers.texts)

# %% Another sparsity, or none: load the model again.
dense, _ = spqt_cli.load(FOLDER, dense=True)

# %% A loop of your own: the prompt runs dense, tokens that were generated run sparsely in `decoding`.
cache = make_prompt_cache(model)
token = mx.argmax(model(mx.array([tokens_of("Count to three.")]), cache=cache)[:, -1], axis=-1)
written = []
with spqt_cli.decoding():
    for _ in range(8):
        if token.item() in tokenizer.eos_token_ids:
            break
        written.append(token.item())
        token = mx.argmax(model(token[None], cache=cache)[:, -1], axis=-1)
print(tokenizer.decode(written))
