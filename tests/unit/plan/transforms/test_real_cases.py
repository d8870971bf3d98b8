"""The trees of real models, by name and shape, that people carry from one form to another."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from equipment.numpy_reader import assert_makes, n_read, specs
from flax import linen, nnx
from flax.training.train_state import TrainState

from lazy_orbax.plan.boxes import Box
from lazy_orbax.plan.transforms.rules import (
    cast,
    drop,
    fuse,
    init,
    pad_to,
    rename,
    reshape,
    scale,
    select,
    split,
    stack,
    strip,
    transpose,
    unstack,
)
from lazy_orbax.plan.transforms.transform_map import TransformMap

BF16 = np.dtype(ml_dtypes.bfloat16)
EMBED, MLP, HEADS, KV_HEADS, HEAD, LAYERS, VOCAB = 16, 24, 4, 2, 3, 6, 50


def values(shape, seed, dtype=np.float32):
    return np.random.default_rng(seed).integers(-99, 99, shape).astype(dtype)


def trained(params):
    """A train state as Optax's Adam in a chain has it, by Orbax's names."""
    tree = {f"params.params.{name}": array for name, array in params.items()}
    for k, field in enumerate(["mu", "nu"]):
        tree |= {f"opt_state.1.0.{field}.params.{n}": a + k + 1 for n, a in params.items()}
    return tree | {"opt_state.1.0.count": np.int32(7)[...], "step": np.int32(7)[...]}


LAYER = {
    "self_attention.query.kernel": (EMBED, HEADS, HEAD),
    "self_attention.out.kernel": (HEADS, HEAD, EMBED),
    "mlp.wi_0.kernel": (EMBED, MLP),
    "pre_self_attention_layer_norm.scale": (EMBED,),
}
SHARED = {"token_embedder.embedding": (VOCAB, EMBED), "decoder.decoder_norm.scale": (EMBED,)}


def maxtext():
    """MaxText's parameters, scanned (layers on axis 1) and not."""
    shared = {name: values(shape, i) for i, (name, shape) in enumerate(SHARED.items())}
    layers = {
        name: [values(shape, 10 * k + i) for i in range(LAYERS)]
        for k, (name, shape) in enumerate(LAYER.items())
    }
    scanned = {f"decoder.layers.{n}": np.stack(a, 1) for n, a in layers.items()}
    unscanned = {f"decoder.layers_{i}.{n}": a[i] for n, a in layers.items() for i in range(LAYERS)}
    return trained(shared | scanned), trained(shared | unscanned)


UNSCAN = unstack(
    r"params\.params\.decoder\.layers\.(.*)", r"params.params.decoder.layers_{layer}.\1", 1
)
SCAN = stack(r"params\.params\.decoder\.layers_(\d+)\.(.*)", r"params.params.decoder.layers.\2", 1)


def test_maxtext_scanned_to_unscanned_and_back():
    scanned, unscanned = maxtext()
    assert_makes(TransformMap([UNSCAN]).plan(specs(scanned), specs(unscanned)), scanned, unscanned)
    assert_makes(TransformMap([SCAN]).plan(specs(unscanned), specs(scanned)), unscanned, scanned)
    plan = TransformMap([UNSCAN, SCAN]).plan(specs(scanned), specs(scanned))
    assert_makes(plan, scanned, scanned)


def test_maxtext_weights_alone_for_serving():
    scanned, unscanned = maxtext()
    wanted = {
        name.removeprefix("params."): array.astype(BF16)
        for name, array in unscanned.items()
        if name.startswith("params.")
    }
    rules = [select(r"params\..*"), UNSCAN, rename(r"params\.(.*)", r"\1"), cast(".*", BF16)]
    plan = TransformMap(rules).plan(specs(scanned), specs(wanted))
    assert_makes(plan, scanned, wanted)
    assert len(plan.dropped) == 2 * len(LAYER) + 2 * len(SHARED) + 2


def test_maxtext_blocks_of_two_kinds_of_layers():
    """Gemma's: a scanned block has a local and a global layer."""
    layers = [values((EMBED, MLP), i) for i in range(LAYERS)]
    stored = {f"decoder.layers_{i}.w": layer for i, layer in enumerate(layers)}
    wanted = {
        "decoder.layers.layers_0.w": np.stack(layers[0::2], 1),
        "decoder.layers.layers_1.w": np.stack(layers[1::2], 1),
    }
    there = [
        stack(
            rf"decoder\.layers_(\d*[{numbers}])\.w",
            f"decoder.layers.layers_{i}.w",
            1,
            numbers=range(i, LAYERS, 2),
        )
        for i, numbers in enumerate(["02468", "13579"])
    ]
    back = [
        unstack(
            rf"decoder\.layers\.layers_{i}\.w",
            "decoder.layers_{layer}.w",
            1,
            numbers=range(i, LAYERS, 2),
        )
        for i in (0, 1)
    ]
    assert_makes(TransformMap(there).plan(specs(stored), specs(wanted)), stored, wanted)
    assert_makes(TransformMap(back).plan(specs(wanted), specs(stored)), wanted, stored)


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Embed(VOCAB, EMBED)(x)
        return linen.Dense(MLP)(linen.LayerNorm()(x))


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, EMBED, rngs=rngs)
        self.norm = nnx.LayerNorm(EMBED, rngs=rngs)
        self.dense = nnx.Linear(EMBED, MLP, rngs=rngs)


def flat(tree):
    named = ocp.tree.to_flat_dict(tree, sep=".")
    return {name: np.asarray(array) for name, array in named.items()}


def test_a_linen_tree_becomes_an_nnx_one_with_its_optimizer():
    model = LinenModel()
    params = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    optimizer = optax.adamw(1e-3)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)
    grads = jax.tree.map(lambda x: x + 1, params)
    stored = flat(state.apply_gradients(grads=grads))
    other = NnxModel(nnx.Rngs(1))
    wanted = flat(
        {
            "model": nnx.state(other),
            "optimizer": nnx.state(nnx.Optimizer(other, optimizer, wrt=nnx.Param)),
        }
    )
    rules = [
        rename(r"params\.Embed_0\.(.*)", r"params.embed.\1"),
        rename(r"params\.LayerNorm_0\.(.*)", r"params.norm.\1"),
        rename(r"params\.Dense_0\.(.*)", r"params.dense.\1"),
        rename(r"opt_state\.(.*)", r"optimizer.opt_state.\1"),
        rename(r"params\.(.*)", r"model.\1.value"),
        rename(r"optimizer\.opt_state\.0\.count", "optimizer.opt_state.0.count.value"),
        rename("step", "optimizer.step.value"),
        cast(r"optimizer\.(opt_state\.0\.count|step)\.value", "uint32"),
    ]
    counts = {"optimizer.step.value", "optimizer.opt_state.0.count.value"}
    wanted_specs = {n: (a.shape, "uint32" if n in counts else a.dtype) for n, a in wanted.items()}
    plan = TransformMap(rules).plan(specs(stored), wanted_specs)
    words = {"Embed_0": "embed", "LayerNorm_0": "norm", "Dense_0": "dense"}
    made = {}
    for name, array in stored.items():
        new = ".".join(words.get(word, word) for word in name.split(".")) + ".value"
        new = new.replace("params.", "model.") if new.startswith("params") else f"optimizer.{new}"
        made[new] = array.astype("uint32") if new in counts else array
    assert set(made) == set(wanted)
    assert_makes(plan, stored, made)


@pytest.mark.parametrize(("stored_to", "wanted_to"), [(64, 56), (56, 64), (VOCAB, 64), (64, VOCAB)])
def test_a_vocabulary_padded_for_one_mesh_is_padded_for_another(stored_to, wanted_to):
    embedding, head = values((VOCAB, EMBED), 1), values((EMBED, VOCAB), 2)

    def padded(n):
        rows = n - VOCAB
        return trained(
            {
                "embed": np.pad(embedding, ((0, rows), (0, 0))),
                "head": np.pad(head, ((0, 0), (0, rows))),
            }
        )

    stored, wanted = padded(stored_to), padded(wanted_to)
    for tree in (stored, wanted):  # Adam's moments of padding are zero.
        for name, array in tree.items():
            if name.startswith("opt") and array.ndim:
                array[VOCAB:] = 0 if "embed" in name else array[VOCAB:]
                array[:, VOCAB:] = 0 if "head" in name else array[:, VOCAB:]
    rules = []
    if stored_to > VOCAB:
        rules += [strip(r".*\.embed", (VOCAB, None)), strip(r".*\.head", (None, VOCAB))]
    if wanted_to > VOCAB:
        rules += [pad_to(r".*\.embed", (wanted_to, None)), pad_to(r".*\.head", (None, wanted_to))]
    plan = TransformMap(rules).plan(specs(stored), specs(wanted))
    assert_makes(plan, stored, wanted)
    last = Box((wanted_to - 1, 0), (1, EMBED))
    assert n_read(plan.takes("params.params.embed", last)) == (EMBED if wanted_to == VOCAB else 0)


def test_a_base_model_and_its_lora_become_one_tree():
    base = {f"params.l{i}.attn.q.kernel": values((EMBED, MLP), i) for i in range(2)}
    base |= {
        "opt_state.0.count": np.int32(3)[...],
        "opt_state.0.mu.l0.attn.q.kernel": base["params.l0.attn.q.kernel"],
    }
    lora = {
        f"params.l{i}.attn.q.{ab}": values(shape, 10 + i)
        for i in range(2)
        for ab, shape in (("lora_a", (EMBED, 4)), ("lora_b", (4, MLP)))
    }
    lora |= {f"opt_state.0.mu.{name[7:]}": array + 1 for name, array in lora.items()}
    wanted = {
        name.replace("kernel", "base.kernel"): array
        for name, array in base.items()
        if name.startswith("params")
    }
    wanted |= {
        name.replace(".lora_", ".lora.").replace("opt_state.0.mu", "opt_state.mu"): array
        for name, array in lora.items()
    }
    wanted["params.l0.attn.q.alpha"] = np.full((), 16, np.float32)
    rules = [
        select(r"params\..*", source="base"),
        rename(r"(.*)\.kernel", r"\1.base.kernel", source="base"),
        rename(r"params\.(.*)\.lora_([ab])", r"params.\1.lora.\2", source="lora"),
        rename(r"opt_state\.0\.(.*)", r"opt_state.\1", source="lora"),
        init(r"params\..*\.alpha", 16),
    ]
    stored = {"base": base, "lora": lora}
    plan = TransformMap(rules, ["base", "lora"]).plan(
        {source: specs(leaves) for source, leaves in stored.items()}, specs(wanted)
    )
    assert_makes(plan, stored, wanted)


def gqa():
    """Weights of grouped attention, apart: embed x heads x head, of which KV has fewer."""
    return [values((EMBED, n, HEAD), i) for i, n in enumerate([HEADS, KV_HEADS, KV_HEADS])]


def test_gqa_fused_one_behind_the_other():
    q, k, v = gqa()
    fused = np.concatenate([x.reshape(EMBED, -1) for x in (q, k, v)], 1)
    stored, wanted = {"a.q": q, "a.k": k, "a.v": v}, {"a.qkv": fused}
    rules = [
        *(reshape(rf"a\.{x}", (EMBED, -1)) for x in "qkv"),
        fuse([r"(.*)\.q", r"(.*)\.k", r"(.*)\.v"], r"\1.qkv", 1),
    ]
    assert_makes(TransformMap(rules).plan(specs(stored), specs(wanted)), stored, wanted)
    back = [
        split(r"(.*)\.qkv", [rf"\1.{x}" for x in "qkv"], 1, [x.shape[1] * HEAD for x in (q, k, v)]),
        reshape(r"a\.q", (EMBED, HEADS, HEAD)),
        reshape(r"a\.[kv]", (EMBED, KV_HEADS, HEAD)),
    ]
    assert_makes(TransformMap(back).plan(specs(wanted), specs(stored)), wanted, stored)


def test_gqa_fused_group_by_group_for_tensor_parallelism():
    """Megatron's: each group has its queries, its key and its value, so that shards are whole."""
    q, k, v = gqa()
    per_group = HEADS // KV_HEADS
    groups = [
        x.transpose(1, 2, 0).reshape(KV_HEADS, n, HEAD, EMBED)
        for x, n in ((q, per_group), (k, 1), (v, 1))
    ]
    fused = np.concatenate(groups, 1).reshape(-1, EMBED)
    stored, wanted = {"q": q, "k": k, "v": v}, {"qkv": fused}
    rules = [
        transpose("[qkv]", (1, 2, 0)),
        reshape("q", (KV_HEADS, per_group, HEAD, EMBED)),
        reshape("[kv]", (KV_HEADS, 1, HEAD, EMBED)),
        fuse(["q", "k", "v"], "qkv", 1),
        reshape("qkv", (-1, EMBED)),
    ]
    plan = TransformMap(rules).plan(specs(stored), specs(wanted))
    assert_makes(plan, stored, wanted)
    half = len(fused) // KV_HEADS
    takes = plan.takes("qkv", Box((half, 0), (half, EMBED)))
    assert {take.leaf for take in takes} == {"q", "k", "v"}
    assert n_read(takes) == half * EMBED
    back = [
        reshape("qkv", (KV_HEADS, per_group + 2, HEAD, EMBED)),
        split("qkv", ["q", "k", "v"], 1, [per_group, 1, 1]),
        reshape("[qkv]", (-1, HEAD, EMBED)),
        transpose("[qkv]", (2, 0, 1)),
    ]
    assert_makes(TransformMap(back).plan(specs(wanted), specs(stored)), wanted, stored)


def test_weights_of_torch_become_a_scanned_bfloat16_model():
    """Linear layers are stored the other way round there; queries are scaled once for all."""
    layers = range(LAYERS)
    stored = {f"model.layers.{i}.q_proj.weight": values((MLP, EMBED), i) for i in layers}
    stored |= {f"model.layers.{i}.rotary.inv_freq": values((4,), i) for i in layers}
    stored |= {"model.embed_tokens.weight": values((VOCAB, EMBED), 77)}
    rules = [
        drop(r".*\.inv_freq"),
        rename(r"model\.layers\.(\d+)\.q_proj\.weight", r"l\1.q"),
        transpose(r"l\d+\.q"),
        scale(r"l\d+\.q", 0.25),
        stack(r"l(\d+)\.q", "params.layers.q.kernel"),
        rename(r"model\.embed_tokens\.weight", "params.embed"),
        pad_to(r"params\.embed", (64, None)),
        cast(".*", "bfloat16"),
    ]
    queries = [stored[f"model.layers.{i}.q_proj.weight"].T * 0.25 for i in layers]
    embed = np.pad(stored["model.embed_tokens.weight"], ((0, 64 - VOCAB), (0, 0)))
    wanted = {
        "params.layers.q.kernel": np.stack(queries).astype(BF16),
        "params.embed": embed.astype(BF16),
    }
    plan = TransformMap(rules).plan(specs(stored), specs(wanted))
    assert_makes(plan, stored, wanted)
    shard = Box((2, 4, 0), (3, 4, MLP))
    takes = plan.takes("params.layers.q.kernel", shard)
    assert len(takes) == 3
    assert n_read(takes) == math.prod(shard.shape)
