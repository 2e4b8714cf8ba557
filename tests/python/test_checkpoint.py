"""Checkpoints from Python: read, quantise, read back."""

import json

import numpy as np
import octomoe
import pytest
import reference


def test_config_and_layers(checkpoint_path):
    checkpoint = octomoe.load_checkpoint(checkpoint_path)
    config = checkpoint.config
    assert (config.model_type, config.experts, config.top_k) == ("qwen3_moe", 16, 4)
    assert (config.hidden, config.intermediate) == (256, 96)
    assert config.scheme == "bf16"
    assert config.route == octomoe.RouteOptions.qwen3()
    assert checkpoint.layers == [0, 1, 2, 3]
    assert len(checkpoint) == 4
    layer = checkpoint[1]
    assert layer.experts.scheme == "bf16"
    assert layer.router.shape == (16, 256)
    assert layer.shared_expert is None
    assert "qwen3_moe" in repr(checkpoint)
    assert [layer.index for layer in checkpoint] == [0, 1, 2, 3]
    part = checkpoint.layer(0, 4, 8).experts
    assert part.experts == 8
    whole = checkpoint[0].experts.tensors()["w2"]["values"]
    np.testing.assert_array_equal(part.tensors()["w2"]["values"], whole[4:12])


def test_a_layer_runs(checkpoint_path):
    checkpoint = octomoe.load_checkpoint(checkpoint_path)
    layer = checkpoint[0]
    x = np.random.default_rng(0).normal(size=(10, 256)).astype(np.float32)
    logits = x @ layer.router.astype(np.float32).T
    topk_weights, ids = octomoe.route(
        logits, checkpoint.config.top_k, options=checkpoint.config.route
    )
    plain = reference.moe(layer.experts, x, ids, topk_weights)
    for scheme, limit in (("bf16", 1e-3), ("int8_channel", 0.03), ("int8_block", 0.03)):
        y = layer.to(scheme).moe_layer()(x, ids, topk_weights)
        assert reference.error(y, plain) < limit


@pytest.mark.parametrize(
    "scheme", ["int8_channel", "int8_block", "int8_hybrid", "w4a8_fp8", "fp16"]
)
def test_quantised_folder_reads_back(checkpoint_path, tmp_path, scheme):
    seen = []
    out = tmp_path / "out"
    octomoe.quantize_checkpoint(
        checkpoint_path,
        out,
        scheme,
        progress=lambda done, total, name: seen.append((done, total, name)),
    )
    assert seen
    assert seen[-1][0] == seen[-1][1]
    assert all(isinstance(name, str) for _, _, name in seen)
    checkpoint = octomoe.load_checkpoint(out)
    assert checkpoint.config.scheme == scheme
    source = octomoe.load_checkpoint(checkpoint_path)
    direct = source[2].to(scheme).experts.tensors()
    stored = checkpoint[2].experts.tensors()
    for part in ("w13", "w2"):
        for name, value in direct[part].items():
            got = stored[part][name]
            assert got.dtype == value.dtype
            np.testing.assert_array_equal(got.view(np.uint8), value.view(np.uint8), err_msg=name)
    np.testing.assert_array_equal(
        checkpoint[2].router.view(np.uint16), source[2].router.view(np.uint16)
    )


def test_torch_tensors(checkpoint_path):
    torch = pytest.importorskip("torch", reason="PyTorch is missing")
    layer = octomoe.load_checkpoint(checkpoint_path, framework="torch")[0]
    assert layer.router.dtype == torch.bfloat16
    assert layer.experts.dequantize()[0].shape == (16, 192, 256)


def test_errors(checkpoint_path, tmp_path):
    with pytest.raises(octomoe.FileError, match="no-such-folder") as caught:
        octomoe.load_checkpoint(tmp_path / "no-such-folder")
    assert caught.value.code == "io"
    (tmp_path / "model.safetensors").symlink_to(checkpoint_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(octomoe.FormatError, match="config.json"):
        octomoe.load_checkpoint(tmp_path)
    config = json.loads((checkpoint_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "dense"}))
    with pytest.raises(octomoe.Error, match="dense"):
        octomoe.load_checkpoint(tmp_path)
    with pytest.raises(octomoe.Error, match="7"):
        octomoe.load_checkpoint(checkpoint_path)[7]
    with pytest.raises(octomoe.InvalidArgument, match="int3"):
        octomoe.quantize_checkpoint(checkpoint_path, tmp_path / "x", "int3")
    out = tmp_path / "exists"
    out.mkdir()
    (out / "file").write_text("mine")
    with pytest.raises(octomoe.Error, match="exists"):
        octomoe.quantize_checkpoint(checkpoint_path, out)
    assert (out / "file").read_text() == "mine"


def test_an_error_in_progress_stops(checkpoint_path, tmp_path):
    def stop(done, total, name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        octomoe.quantize_checkpoint(checkpoint_path, tmp_path / "x", progress=stop)
    assert not (tmp_path / "x" / "config.json").exists()
