"""The model and the data of `train_lm.py`: a transformer over the bytes of real source code."""

import pathlib
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

VOCABULARY = 256  # bytes
WIDTH, HEADS, LAYERS = 128, 4, 2
SEQUENCE, BATCH = 64, 16
CORPUS_BYTES = 1 << 20


class Block(nnx.Module):
    """Pre-norm causal self-attention and a feed-forward layer, each added to its input."""

    def __init__(self, rngs: nnx.Rngs):
        self.attention_norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs)
        self.out = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.1)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs) -> jax.Array:
        heads = self.qkv(self.attention_norm(x)).reshape(*x.shape[:2], 3, HEADS, WIDTH // HEADS)
        q, k, v = jnp.moveaxis(heads, 2, 0)
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
        x = x + self.dropout(self.out(attended), rngs=rngs)
        return x + self.dropout(self.down(jax.nn.gelu(self.up(self.mlp_norm(x)))), rngs=rngs)


class ByteTransformer(nnx.Module):
    """Predicts the next byte of a text."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (SEQUENCE, WIDTH)))
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens: jax.Array, rngs: nnx.Rngs) -> jax.Array:
        x = self.embed(tokens) + self.position[...]
        for block in self.blocks:
            x = block(x, rngs)
        return self.head(self.norm(x))


def standard_library_text() -> np.ndarray:
    """Returns the first `CORPUS_BYTES` bytes of Python's own modules, in order of their names."""
    text = bytearray()
    for path in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= CORPUS_BYTES:
            return np.frombuffer(bytes(text[:CORPUS_BYTES]), np.uint8)
    raise RuntimeError(f"wanted {CORPUS_BYTES} bytes of *.py files, found {len(text)}")


class Batches:
    """An endless iterator over the text; `position` is all that it needs to go on from there."""

    def __init__(self, text: np.ndarray, position: int = 0):
        self.text = text
        self.position = position

    def __next__(self) -> np.ndarray:
        """Returns the next [BATCH, SEQUENCE + 1] bytes: inputs, and the same shifted by one."""
        stream_bytes = len(self.text) // BATCH
        starts = np.arange(BATCH) * stream_bytes + self.position % (stream_bytes - SEQUENCE)
        self.position += SEQUENCE
        return self.text[starts[:, None] + np.arange(SEQUENCE + 1)]
