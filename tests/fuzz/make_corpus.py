#!/usr/bin/env python3
"""Write the fuzzers' seeds: python tests/fuzz/make_corpus.py. Other files in the corpora stay."""

import json
import struct
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"


def seed(target, name, data):
    folder = CORPUS / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def safetensors(header, data=b"", length=None):
    text = header if isinstance(header, str) else json.dumps(header, separators=(",", ":"))
    return struct.pack("<Q", len(text) if length is None else length) + text.encode() + data


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def safetensors_seeds():
    def add(name, *args, **keywords):
        seed("safetensors", name, safetensors(*args, **keywords))

    add("empty", "{}")
    add("metadata", {"__metadata__": {"format": "pt"}})
    add("scalar", {"s": entry("F32", [], 0, 4)}, b"abcd")
    add("no_elements", {"z": entry("I64", [0, 3], 0, 0)})
    add("two", {"a": entry("I8", [2, 2], 0, 4), "b": entry("BF16", [3], 4, 10)}, bytes(10))
    add("fp4", {"a": entry("F4", [2, 3], 0, 3), "b": entry("F6_E2M3", [4], 3, 6)}, bytes(6))
    expert = "model.layers.0.mlp.experts.0."
    add(
        "expert",
        {
            expert + "gate_proj.weight": entry("I8", [2, 4], 0, 8),
            expert + "gate_proj.weight_scale": entry("BF16", [2, 1], 8, 12),
            "model.language_model.layers.12.mlp.experts.gate_up_proj": entry("F16", [1], 12, 14),
            "model.layers.1.block_sparse_moe.experts.7.w3.weight": entry("U8", [1], 14, 15),
        },
        bytes(15),
    )
    add("overlap", {"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, bytes(3))
    add("gap", {"a": entry("U8", [1], 1, 2)}, bytes(2))
    add("overflow", {"a": entry("F64", [1 << 61], 0, 0)})
    add("negative", {"a": entry("U8", [-1], 0, 1)}, b"x")
    add("length_2_63", "{}", length=1 << 63)
    add("nested", '{"a":' + "[" * 80 + "]" * 80 + "}")
    add("escapes", '{"\\u0000\\ud83d\\ude00":3}')
    seed("safetensors", "not_utf8", struct.pack("<Q", 8) + b'{"\xff":3}')


def config_seeds():
    base = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    }
    qwen = {
        **base,
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "norm_topk_prob": True,
        "hidden_act": "silu",
    }
    args = {
        "num_bits": 8,
        "type": "int",
        "strategy": "channel",
        "symmetric": True,
        "dynamic": False,
    }
    acts = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
    group = {
        "targets": ["Linear"],
        "weights": args,
        "input_activations": acts,
        "output_activations": None,
    }
    int4 = {**group, "weights": {**args, "num_bits": 4, "strategy": "group", "group_size": 128}}
    int4["input_activations"] = {**acts, "type": "float"}
    compressed = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    models = {
        "qwen3": qwen,
        "qwen35": {
            "model_type": "qwen3_5_moe",
            "text_config": {
                **qwen,
                "model_type": "qwen3_5_moe_text",
                "shared_expert_intermediate_size": 32,
            },
        },
        "ernie": {
            **base,
            "model_type": "ernie4_5_moe",
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_num_shared_experts": 2,
            "moe_norm_min": 1e-12,
        },
        "deepseek": {
            **base,
            "model_type": "deepseek_v3",
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
        },
        "mixtral": {
            **base,
            "model_type": "mixtral",
            "num_local_experts": 8,
            "intermediate_size": 64,
        },
    }
    quant = {
        "w8a8": {**compressed, "config_groups": {"group_0": group}, "ignore": ["lm_head"]},
        "w4afp8_compressed": {
            **compressed,
            "config_groups": {"a": int4, "b": {**group, "targets": ["re:.*experts.*"]}},
        },
        "block": {
            "quant_method": "blockwise_int8",
            "weight_block_size": [128, 128],
            "activation_scheme": "dynamic",
        },
        "channel": {"quant_method": "w8a8_int8"},
        "w4afp8": {"quant_method": "w4afp8", "group_size": 128, "moe_activation_scheme": "static"},
        "hybrid": {
            "quant_method": "octomoe_int8_hybrid",
            "version": 1,
            "weight_block_size": [128, 128],
            "super_group": 256,
            "q_max": 16,
        },
        "unknown": {"quant_method": "fp8"},
    }
    for name, config in models.items():
        seed("config", name, json.dumps(config))
    for name, config in quant.items():
        seed("config", "quant_" + name, json.dumps({**qwen, "quantization_config": config}))


def index_seeds():
    def add(name, weight_map):
        seed("index", name, json.dumps({"metadata": {"total_size": 3}, "weight_map": weight_map}))

    add("two", {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    add("none", {})
    add("parent", {"a": "../x"})
    add("absolute", {"a": "/etc/passwd"})
    add("number", {"a": 3})
    seed("index", "no_map", "{}")


if __name__ == "__main__":
    safetensors_seeds()
    config_seeds()
    index_seeds()
