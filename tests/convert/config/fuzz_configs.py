"""Random valid configs of twelve families, in both spellings: spqt's model against `decoders`.

    python -m tests.convert.config.fuzz_configs --count 2000

Each case is named by its seed. Weights are multiples of a power of two that 8 bits hold without loss in
groups along outputs and along inputs, so that a conversion changes none and float32 is all that separates
the two. A case is right where the logits agree within TOLERANCE, or where spqt refuses it by the very key
that the case made unsupported. Every `WHOLE`th case is converted and loaded again; the others stop at the
settled model.
"""

import argparse
import collections
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from spqt_cli.convert import convert, parameters, source
from spqt_cli.decode import context, session
from spqt_cli.errors import SpqtError, UnsupportedError
from tests.conftest import VOCAB, write_tokenizer
from tests.lib import decoders

TOLERANCE = 1e-3  # of the largest logit
WHOLE = 8
TOKENS, STEPS = 22, 2  # of a prompt, and decoded one by one after it
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "smollm3", "mixtral", "gemma2", "gemma3_text", "phi3", "starcoder2",
    "granite", "olmo2",
)  # fmt: skip
TIED = ("gemma2", "gemma3_text", "starcoder2")  # by transformers' default
WINDOWED = ("mistral", "qwen2", "qwen3", "mixtral", "gemma2", "gemma3_text", "phi3", "starcoder2")


def lossless(random: np.random.Generator, rows: int, columns: int, scale: float) -> np.ndarray:
    """(rows, columns) float32: each 32 neighbours in a row or column have the least and the largest code."""
    codes = random.integers(-40, 41, (rows, columns))
    diagonal = np.add.outer(np.arange(rows), np.arange(columns)) % 32
    codes[diagonal == 3], codes[diagonal == 20] = 127, -128
    step = 2.0 ** np.round(np.log2(scale / 40))
    return (codes * step).astype(np.float32)


def weights_of(config: dict[str, Any], random: np.random.Generator, head: bool) -> decoders.Arrays:
    """A checkpoint's tensors under their names. head: store one of its own."""
    kind, hidden, inner = config["model_type"], config["hidden_size"], config["intermediate_size"]
    width = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    found: decoders.Arrays = {}

    def linear(name: str, rows: int, columns: int, bias: bool = False) -> None:
        found[f"{name}.weight"] = lossless(random, rows, columns, 1.2 * columns**-0.5)
        if bias:
            found[f"{name}.bias"] = random.normal(0, 0.3, rows).astype(np.float32)

    def norm(name: str, size: int = hidden) -> None:
        around = 0.0 if kind.startswith("gemma") else 1.0
        found[f"{name}.weight"] = (around + random.normal(0, 0.1, size)).astype(np.float32)
        if kind == "starcoder2":
            found[f"{name}.bias"] = random.normal(0, 0.1, size).astype(np.float32)

    found["model.embed_tokens.weight"] = lossless(random, VOCAB, hidden, 0.5)
    if head:
        linear("lm_head", VOCAB, hidden)
    norm("model.norm")
    biased = kind == "starcoder2" and config.get("use_bias", True)
    attention_bias, mlp_bias = config.get("attention_bias", False) or biased, config.get("mlp_bias", False)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for name in _norms(kind):
            norm(at + name)
        if kind == "phi3":
            linear(f"{at}self_attn.qkv_proj", queries + 2 * keys, hidden)
        else:
            for name, size in (("q", queries), ("k", keys), ("v", keys)):
                linear(f"{at}self_attn.{name}_proj", size, hidden, attention_bias or kind in decoders.BIASED)
        linear(f"{at}self_attn.o_proj", hidden, queries, attention_bias)
        if kind in ("qwen3", "gemma3_text", "olmo2"):
            norm(f"{at}self_attn.q_norm", queries if kind == "olmo2" else width)
            norm(f"{at}self_attn.k_norm", keys if kind == "olmo2" else width)
        if kind == "phi3":
            linear(f"{at}mlp.gate_up_proj", 2 * inner, hidden)
            linear(f"{at}mlp.down_proj", hidden, inner)
        elif kind == "starcoder2":
            linear(f"{at}mlp.c_fc", inner, hidden, biased)
            linear(f"{at}mlp.c_proj", hidden, inner, biased)
        elif kind == "mixtral":
            linear(f"{at}block_sparse_moe.gate", config["num_local_experts"], hidden)
            for expert in range(config["num_local_experts"]):
                for name, rows, columns in (
                    ("w1", inner, hidden),
                    ("w2", hidden, inner),
                    ("w3", inner, hidden),
                ):
                    linear(f"{at}block_sparse_moe.experts.{expert}.{name}", rows, columns)
        else:
            for name, rows, columns in (
                ("gate", inner, hidden),
                ("up", inner, hidden),
                ("down", hidden, inner),
            ):
                linear(f"{at}mlp.{name}_proj", rows, columns, mlp_bias)
    return found


def _norms(kind: str) -> tuple[str, ...]:
    if kind == "olmo2":
        return ("post_attention_layernorm", "post_feedforward_layernorm")
    if kind in ("gemma2", "gemma3_text"):
        return ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
                "post_feedforward_layernorm")  # fmt: skip
    return ("input_layernorm", "post_attention_layernorm")


class Case:
    """One random config. config: as it is written. meant: for `decoders`. unsupported: the key that is so."""

    def __init__(self, seed: int) -> None:
        self.seed, self.random = seed, np.random.default_rng(seed)
        kind = self.pick(FAMILIES)
        self.unsupported: str | None = None
        own_width = kind not in ("phi3", "starcoder2", "granite", "qwen2", "smollm3", "mixtral")
        heads, self.width = int(self.pick((2, 4))), int(self.pick((32, 64) if own_width else (32,)))
        self.config: dict[str, Any] = {
            "model_type": kind, "hidden_size": int(self.pick((64, 128))) if own_width else heads * 32,
            "intermediate_size": int(self.pick((96, 160))), "num_hidden_layers": int(self.pick((2, 3))),
            "num_attention_heads": heads, "num_key_value_heads": int(self.pick((heads, heads // 2, 1))),
            "vocab_size": VOCAB, "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 2,
            "pad_token_id": 0, "norm_epsilon" if kind == "starcoder2" else "rms_norm_eps": 1e-5,
            self.pick(("dtype", "torch_dtype")): "float32",
        }  # fmt: skip
        if own_width:
            self.config["head_dim"] = self.width
        self.kind, self.layers = kind, self.config["num_hidden_layers"]
        self.meant_only: dict[str, Any] = {}
        self.family()
        self.windows()
        self.rope()
        self.twist()
        self.head = self.ties()
        self.meant = {**self.config, **self.meant_only}

    def pick(self, values: Any) -> Any:
        return values[int(self.random.integers(len(values)))]

    def chance(self, share: float) -> bool:
        return bool(self.random.random() < share)

    def family(self) -> None:
        """Keys that only some families have."""
        config, kind = self.config, self.kind
        if kind in ("llama", "granite") or (kind == "olmo2" and self.chance(0.5)):
            config["attention_bias"] = self.chance(0.5)
        if kind in ("llama", "granite"):
            config["mlp_bias"] = self.chance(0.5)
        if kind == "granite":
            config |= {"logits_scaling": 2.0, "attention_multiplier": 0.25, "embedding_multiplier": 3.0,
                       "residual_multiplier": 0.5}  # fmt: skip
        if kind == "mixtral":
            config |= {"num_local_experts": 4, "num_experts_per_tok": int(self.pick((1, 2)))}
        if kind.startswith("gemma"):
            config["query_pre_attn_scalar"] = int(self.pick((16, 64)))
        if kind == "gemma2" and self.chance(0.5):
            config |= {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0}
        if kind == "smollm3":
            config["no_rope_layers"] = [int(self.chance(0.7)) for _ in range(self.layers)]
            config["use_sliding_window"] = False

    def windows(self) -> None:
        config, kind = self.config, self.kind
        if kind == "gemma3_text":
            pattern = int(self.pick((1, 2, 3)))
            self.meant_only["pattern"] = pattern
            config["sliding_window"] = int(self.pick((5, 12)))
            if self.chance(0.5):
                config["sliding_window_pattern"] = pattern
            else:
                config["layer_types"] = [
                    "sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(self.layers)
                ]
        elif kind in WINDOWED:
            config["sliding_window"] = self.pick((None, 5, 12, 700, 4096))
            if kind in ("qwen2", "qwen3"):
                config |= {
                    "use_sliding_window": self.chance(0.7),
                    "max_window_layers": int(self.pick((0, 1, 9))),
                }
        if kind in ("mistral", "qwen2", "qwen3", "phi3") and config["sliding_window"] is None:
            self.meant_only["sliding_window"] = None

    def rope(self) -> None:
        """Rotary positions of any kind, in the old spelling or the new."""
        config, kind = self.config, self.kind
        base = float(self.pick((500.0, 10000.0, 1e6)))
        kinds = ("default", "longrope") if kind == "phi3" else (
            "default", "default", "linear", "llama3", "yarn", "yarn", "dynamic", "longrope")  # fmt: skip
        scaling = self.scaling(self.pick(kinds))
        local = float(self.pick((100.0, 10000.0)))
        if kind == "phi3" and self.chance(0.5):
            config["partial_rotary_factor"] = 0.5
            scaling |= {
                key: scaling[key][: self.width // 4]
                for key in ("short_factor", "long_factor")
                if key in scaling
            }
        if kind == "phi3" and "short_factor" in scaling:
            config["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
        if self.chance(0.5):
            new: dict[str, Any] = {"rope_type": "default", **scaling, "rope_theta": base}
            if kind == "gemma3_text":
                sliding = {"rope_type": "default", "rope_theta": local}
                new = {"full_attention": new, "sliding_attention": sliding}
            config["rope_parameters"] = new
            return
        if self.chance(0.8):
            config["rope_theta"] = base
        if kind == "gemma3_text" and self.chance(0.8):
            config["rope_local_base_freq"] = local
        if scaling:
            names = self.pick((("type",), ("rope_type",), ("type", "rope_type")))
            named = scaling.pop("rope_type")
            config["rope_scaling"] = {**dict.fromkeys(names, named), **scaling}
        elif self.chance(0.5):
            config["rope_scaling"] = None

    def scaling(self, kind: str) -> dict[str, Any]:
        factor, pairs = self.pick((2.0, 4, 8.0)), self.width // 2
        if kind == "default":
            return {}
        if kind in ("linear", "dynamic"):
            return {"rope_type": kind, "factor": factor}
        found = {
            "rope_type": kind,
            "factor": factor,
            "original_max_position_embeddings": int(self.pick((300, 512))),
        }
        if kind == "llama3":
            found |= {"low_freq_factor": 1.0, "high_freq_factor": float(self.pick((2.0, 4.0)))}
        if kind == "longrope":
            found.pop("factor")
            short, long = self.random.uniform(1, 2, (2, pairs)).round(3).tolist()
            found |= {"short_factor": short, "long_factor": self.pick((short, long))}
            if self.chance(0.3):
                found["attention_factor"] = 1.2
        if kind == "yarn":
            if self.chance(0.4):
                found["attention_factor"] = float(self.pick((0.8, 1.0, 1.4)))
            if self.chance(0.3):
                found |= {"mscale": 1.2, "mscale_all_dim": 0.7}
            if self.chance(0.4):
                found |= {"beta_fast": float(self.pick((8, 16))), "beta_slow": 2.0}
            if self.chance(0.4):
                found["truncate"] = self.chance(0.3)
        return found

    def twist(self) -> None:
        """Now and then a key that mlx-lm's class can't honour."""
        if self.chance(0.06):
            if self.kind == "starcoder2" and self.chance(0.5):
                self.config["use_bias"], self.unsupported = False, "use_bias"
            elif self.kind == "mixtral" and self.chance(0.5):
                self.config["head_dim"], self.width, self.unsupported = 64, 64, "head_dim"
            elif self.kind == "gemma2":
                self.config["attn_logit_softcapping"], self.unsupported = None, "attn_logit_softcapping"
            elif not self.kind.startswith("gemma"):
                self.config["hidden_act"], self.unsupported = "relu", "hidden_act"

    def ties(self) -> bool:
        """Whether a head of its own is stored; the config says so, or leaves it out, or says it wrongly."""
        default = self.kind in TIED
        if self.kind == "gemma2":
            return False
        head = self.chance(0.5)
        said = self.pick((None, "right", "wrong" if head else "right"))
        if said is not None or head == default:
            self.config["tie_word_embeddings"] = (not head) if said != "wrong" else True
        return head


class Runner:
    """Runs cases in one temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_tokenizer(folder)

    def case(self, seed: int) -> str:
        """'agrees', 'refused', or what is wrong with a case."""
        case = Case(seed)
        weights = weights_of(case.config, case.random, case.head)
        place = self.folder / "source"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(self.folder / name, place)
        (place / "config.json").write_text(json.dumps(case.config))
        arrays = {name: mx.array(array) for name, array in weights.items()}
        mx.save_safetensors(str(place / "model.safetensors"), arrays, metadata={"format": "pt"})
        ids = [int(i) for i in case.random.integers(5, VOCAB, TOKENS + STEPS)]
        try:
            network = self.whole(place) if seed % WHOLE == 0 else self.settled(place)
        except UnsupportedError as error:
            right = case.unsupported is not None and case.unsupported in error.cause
            return "refused" if right else f"refused without a reason: {error.cause}"
        except SpqtError as error:
            return f"called damaged: {error.cause}"
        wanted = decoders.logits(case.meant, weights, ids)
        found = [np.array(part) for part in _outputs(network, ids)]
        largest = np.abs(wanted).max()
        worst = max(
            float(np.abs(part - wanted[-len(part) :] if part is found[-1] else part - wanted).max() / largest)
            for part in found
        )
        return "agrees" if worst < TOLERANCE else f"differs by {worst:.1e} and nothing says so"

    def settled(self, place: Path) -> Any:
        checkpoint = source.open_folder(place, source.Trust())
        network, weights, _ = parameters.load(checkpoint)
        network.load_weights(list(weights.items()))
        return network

    def whole(self, place: Path) -> Any:
        out = self.folder / "converted"
        shutil.rmtree(out, ignore_errors=True)
        convert.convert(str(place), out, convert.ConvertOptions(bits=8, group_size=32))
        loaded = session.load(out)
        limit = context.tokens(loaded.config)
        assert limit is not None
        assert limit > TOKENS + STEPS
        return loaded.model


def _outputs(network: Any, ids: list[int]) -> list[mx.array]:
    """Logits of all positions at once, and of the last ones decoded with a cache."""
    from mlx_lm.models.cache import make_prompt_cache

    kept = make_prompt_cache(network)
    parts = [network(mx.array([ids[:TOKENS]]), cache=kept)[0, -1:]]
    parts += [network(mx.array([[token]]), cache=kept)[0] for token in ids[TOKENS:]]
    return [network(mx.array([ids]))[0], mx.concatenate(parts)]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    results: collections.Counter[str] = collections.Counter()
    start = time.process_time()
    with tempfile.TemporaryDirectory() as temporary:
        runner = Runner(Path(temporary))
        for seed in range(options.seed, options.seed + options.count):
            result = runner.case(seed)
            results[result.split(":")[0].split(" by ")[0]] += 1
            if result not in ("agrees", "refused"):
                print(f"seed {seed} ({Case(seed).kind}): {result}", flush=True)
    wrong = options.count - results["agrees"] - results["refused"]
    print(json.dumps({**results, "wrong": wrong, "cpu_seconds": round(time.process_time() - start)}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
