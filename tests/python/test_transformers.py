"""replace_experts on small random models of every supported kind."""

import gc
import weakref

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is missing")
transformers = pytest.importorskip("transformers", reason="transformers is missing")

import octomoe  # noqa: E402
from octomoe.transformers import Experts, replace_experts  # noqa: E402

COMMON = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    # One layer: a second one's random router would now and then choose other experts.
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def make(name: str, **config):
    config_class = getattr(transformers, f"{name}Config", None)
    model_class = getattr(transformers, f"{name}ForCausalLM", None)
    if config_class is None or model_class is None:
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(0)
    model = model_class(config_class(**(COMMON | config))).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # the usual initialisation hardly uses the experts
            if parameter.dim() == 3:
                parameter.normal_(0, 0.2)
    return model


def qwen3(**config):
    sizes = {
        "num_hidden_layers": 2,
        "moe_intermediate_size": 96,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "head_dim": 32,
    }
    return make("Qwen3Moe", **(sizes | config))


MODELS = {
    "Qwen3Moe": lambda: qwen3(num_hidden_layers=1),
    "Mixtral": lambda: make("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "DeepseekV3": lambda: make(
        "DeepseekV3",
        num_hidden_layers=2,
        moe_intermediate_size=64,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        num_key_value_heads=2,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=32,
    ),
    "Ernie4_5_Moe": lambda: make(
        "Ernie4_5_Moe",
        moe_intermediate_size=64,
        moe_num_experts=8,
        moe_k=2,
        moe_num_shared_experts=1,
        moe_layer_start_index=0,
    ),
    "GptOss": lambda: make(
        "GptOss", num_local_experts=4, num_experts_per_tok=2, head_dim=32, intermediate_size=64
    ),
    "OlmoeMoe": lambda: make("Olmoe", num_experts=4, num_experts_per_tok=2, num_key_value_heads=2),
}


def logits(model, tokens=24):
    ids = torch.randint(0, 64, (2, tokens), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids).logits.double()


def difference(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    model = MODELS[name]()
    before = logits(model)
    weights_before = {k: v.clone() for k, v in model.state_dict().items()}
    for scheme, limit in (("fp16", 2e-3), ("int8_channel", 0.05), ("int8_hybrid", 0.05)):
        replaced = replace_experts(model, scheme)
        assert replaced.count >= 1
        after = logits(model)
        assert 0 < difference(after, before) < limit, scheme
        replaced.restore()
        assert torch.equal(logits(model), before)
    assert all(torch.equal(v, weights_before[k]) for k, v in model.state_dict().items())


def test_context_manager_and_report():
    model = qwen3()
    before = logits(model)
    with replace_experts(model, "int8_block", threads=1) as replaced:
        assert replaced.count == 2
        assert 0 < replaced.weight_bytes < 2 * 8 * 3 * 64 * 96 * 2
        assert sum(isinstance(m, Experts) for m in model.modules()) == 2
        assert "int8_block" in repr(model)
        with pytest.raises(octomoe.InvalidArgument, match="replaced already"):
            replace_experts(model, "bf16")
    assert torch.equal(logits(model), before)


def test_weights_can_be_freed():
    model = qwen3()
    parameters = sum(p.numel() for p in model.parameters())
    experts = model.model.layers[0].mlp.experts
    size = experts.gate_up_proj.numel() + experts.down_proj.numel()
    gone = weakref.ref(experts.gate_up_proj)
    del experts
    replaced = replace_experts(model, "int8_channel", keep_weights=False)
    gc.collect()
    assert gone() is None
    assert sum(p.numel() for p in model.parameters()) == parameters - 2 * size
    logits(model)
    with pytest.raises(octomoe.InvalidArgument, match="were freed"):
        replaced.restore()


def test_bfloat16_model_and_generation():
    model = qwen3(num_hidden_layers=1).bfloat16()
    before = logits(model)
    with replace_experts(model, "int8_channel"):
        assert difference(logits(model), before) < 0.06
        ids = torch.tensor([[1, 2, 3]])
        made = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert made.shape == (1, 8)


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiled_model(backend):
    torch._dynamo.reset()
    model = qwen3()
    with replace_experts(model, "int8_channel"):
        expected = logits(model)
        compiled = torch.compile(model, backend=backend)
        assert difference(logits(compiled), expected) < 1e-4
    torch._dynamo.reset()


def test_refusals():
    with pytest.raises(octomoe.InvalidArgument, match="no module of stacked experts"):
        replace_experts(torch.nn.Linear(4, 4))
    model = qwen3()
    with pytest.raises(octomoe.InvalidArgument, match='got "int7"'):
        replace_experts(model, "int7")
    assert not any(isinstance(m, Experts) for m in model.modules())
    if not torch.cuda.is_available():
        with pytest.raises(octomoe.Unsupported, match="no usable GPU"):
            replace_experts(model, device="cuda:0")
        assert not any(isinstance(m, Experts) for m in model.modules())
    odd = qwen3(hidden_act="tanh")
    with pytest.raises(octomoe.Unsupported, match="expected an activation among .*got Tanh"):
        replace_experts(odd)
    assert not any(isinstance(m, Experts) for m in odd.modules())


def test_the_trained_model(checkpoint_path):
    """Real weights: INT8 experts hardly change what the model says."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint_path, dtype=torch.float32).eval()
    text = (checkpoint_path / "heldout.txt").read_bytes()[:769]
    data = torch.tensor([list(text)])

    def bits():
        with torch.inference_mode():
            scores = model(data[:, :-1]).logits[0]
        return float(torch.nn.functional.cross_entropy(scores, data[0, 1:])) / 0.6931472

    plain = bits()
    assert 1.0 < plain < 2.5
    for scheme, limit in (("int8_channel", 0.01), ("int8_hybrid", 0.01), ("w4a8_fp8", 0.08)):
        with replace_experts(model, scheme):
            assert abs(bits() - plain) < limit, scheme
