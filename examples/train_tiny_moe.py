#!/usr/bin/env python3
"""Train the tiny byte-level Qwen3-MoE model that the tests and examples read.

The model is small enough to be kept beside the sources, yet it is a trained one: its weights,
its router and what enters its MoE layers have the statistics that random tensors lack.

    apt install bible-kjv bible-kjv-text r-base-core r-cran-janeaustenr
    pip install torch transformers safetensors numpy
    python examples/train_tiny_moe.py prepare-text --out TEXT_DIR
    python examples/train_tiny_moe.py train --text TEXT_DIR --out data/tiny-qwen3-moe
    python examples/train_tiny_moe.py check data/tiny-qwen3-moe

`prepare-text` needs the Debian packages above and no GPU; `train` needs only the folder that
`prepare-text` wrote. With one H100 `train` takes a few minutes; without a GPU it runs too, far
more slowly (lower --steps and --batch). Runs are seeded; GPU kernels still differ in rounding
from one device and library version to another, so the weights are not bit-identical elsewhere.

Texts: the six novels of Jane Austen (Debian package r-cran-janeaustenr, taken from Project
Gutenberg) and the King James Version of the Bible (Debian packages bible-kjv and bible-kjv-text).
Both are in the public domain in the United States and in most of the world; in the United Kingdom
the right to print the King James Version belongs to the Crown under letters patent.
"""

import argparse
import copy
import hashlib
import json
import math
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

LOG2E = 1.0 / math.log(2.0)

# ---------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------

NOVELS = (
    "sensesensibility",
    "prideprejudice",
    "mansfieldpark",
    "emma",
    "northangerabbey",
    "persuasion",
)
# The end of each source is never trained on: first a validation part (chooses the checkpoint),
# then the held-out part (measured once, at the end, and stored beside the model).
AUSTEN_VALIDATION, AUSTEN_HELDOUT = "Chapter 20", "Chapter 22"  # of Persuasion, the last novel
KJV_VALIDATION, KJV_HELDOUT = "Hebrews 1", "2 Peter 1"
SPLITS = ("train", "validation", "heldout")


def run_tool(command):
    """Run a program and return what it printed."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    except FileNotFoundError:
        sys.exit(f"{command[0]} is missing: see --help for the packages to install")
    except subprocess.CalledProcessError as error:
        sys.exit(f"{command[0]} failed: {error.stderr.decode(errors='replace').strip()}")
    return done.stdout.decode("utf-8")


def clean_novel(raw):
    """Undo the hard line breaks of a novel: one paragraph a line, an empty line between them."""
    raw = raw.split("\nA NOTE ON THE TEXT\n")[0]  # a modern editor's note in Northanger Abbey
    paragraphs = []
    for block in re.split(r"\n\s*\n", raw.replace("_", "")):
        text = re.sub(r"\s+", " ", block).strip()
        if not text or not text.strip("* ") or text.startswith(("[At this point", "[End volume")):
            continue
        if text.startswith("*Vide"):
            continue
        paragraphs.append(text.replace(",* it must", ", it must"))
    return "\n\n".join(paragraphs) + "\n\n"


def clean_bible(raw):
    """Drop the verse numbers: one verse a line, a heading before every chapter."""
    chapters = []
    for line in raw.splitlines():
        verse = re.fullmatch(r" +\d+ (\S.*)", line)
        if verse:
            chapters[-1].append(verse.group(1).strip())
        elif re.fullmatch(r"[1-3]? ?[A-Z][A-Za-z ]* \d+", line):
            chapters.append([line + "\n"])
        elif line.strip():
            sys.exit(f"unexpected line from bible: {line[:80]!r}")
    return "".join("\n".join(chapter) + "\n\n" for chapter in chapters)


def cut(text, first, second):
    """Cut a text before two headings that stand alone on their lines."""
    a, b = text.rindex(f"\n{first}\n") + 1, text.rindex(f"\n{second}\n") + 1
    return text[:a], text[a:b], text[b:]


def prepare_text(args):
    novels = []
    for name in NOVELS:
        code = f"writeLines(janeaustenr::{name}, stdout(), useBytes = TRUE)"
        novels.append(clean_novel(run_tool(["Rscript", "-e", code])))
    austen = cut("".join(novels), AUSTEN_VALIDATION, AUSTEN_HELDOUT)
    bible = clean_bible(run_tool(["bible", "-l0", "ge1:1-re22:21"]))
    kjv = cut(bible, KJV_VALIDATION, KJV_HELDOUT)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, one, other in zip(SPLITS, austen, kjv, strict=True):
        data = (one + other).encode()
        (args.out / f"{name}.txt").write_bytes(data)
        print(f"{name}: {len(one.encode())} + {len(other.encode())} = {len(data)} bytes")


# ---------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------


def make_config():
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=768,  # of dense MLP layers, of which there are none
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=1024,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=96,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        router_aux_loss_coef=0.01,
        tie_word_embeddings=False,
    )


def dense_experts(self, hidden_states, top_k_index, top_k_weights):
    """All experts on all tokens as two plain GEMMs, the unchosen ones weighted by zero.

    With so few and so small experts this trains faster than gathering tokens by expert does.
    """
    import torch.nn.functional as F

    tokens, hidden = hidden_states.shape
    experts, inner = self.down_proj.shape[0], self.down_proj.shape[2]
    weights = top_k_weights.new_zeros(tokens, experts).scatter(1, top_k_index, top_k_weights)
    both = F.linear(hidden_states, self.gate_up_proj.reshape(-1, hidden))
    gate, up = both.view(tokens, experts, 2, inner).unbind(2)
    middle = F.silu(gate) * up * weights.unsqueeze(-1).to(both.dtype)
    down = self.down_proj.permute(1, 0, 2).reshape(hidden, experts * inner)
    return F.linear(middle.reshape(tokens, experts * inner), down).to(hidden_states.dtype)


def use_dense_experts(model):
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register("dense_all_experts", dense_experts)
    model.set_experts_implementation("dense_all_experts")


def name_experts_as_published(path):
    """Write num_experts, as published Qwen3-MoE models do; transformers 5 reads both names."""
    settings = json.loads(path.read_text())
    settings["num_experts"] = settings.pop("num_local_experts", settings.get("num_experts"))
    path.write_text(json.dumps(dict(sorted(settings.items())), indent=2) + "\n")


def load_model(folder):
    """The model as saved, on the CPU, with the plain loop over experts."""
    import torch
    from transformers import Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, experts_implementation="eager"
    ).eval()


def balance_loss(router_logits, config):
    """The load-balance loss of Switch Transformer, layer by layer: 1 is perfect balance."""
    import torch
    import torch.nn.functional as F

    total = 0.0
    for logits in router_logits:
        probabilities = torch.softmax(logits.float(), dim=-1)
        chosen = torch.topk(probabilities, config.num_experts_per_tok, dim=-1).indices
        load = F.one_hot(chosen, config.num_experts).float().mean(dim=(0, 1))
        total = total + config.num_experts * (load * probabilities.mean(dim=0)).sum()
    return total / len(router_logits)


def bits_per_byte(model, data, window=1024, batch=32, autocast=False):
    """Mean bits for every byte but the first, read in windows that share no context."""
    import torch
    import torch.nn.functional as F

    device = next(model.parameters()).device
    data = data.to(device).long()
    full = (len(data) - 1) // window
    cuts = [(i * window, min(batch, full - i)) for i in range(0, full, batch)]
    chunks = [data[a : a + n * window + 1].unfold(0, window + 1, window) for a, n in cuts]
    if full * window < len(data) - 1:
        chunks.append(data[full * window :].unsqueeze(0))
    nats, count = 0.0, 0
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        for chunk in chunks:
            logits = model(input_ids=chunk[:, :-1]).logits.float()
            targets = chunk[:, 1:].reshape(-1)
            nats += F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum").item()
            count += targets.numel()
    return nats / count * LOG2E


def read_bytes(path):
    import numpy as np
    import torch

    return torch.from_numpy(np.fromfile(path, dtype=np.uint8))


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


def add_dropout(model, rate):
    """Dropout on both residual branches of every layer, by hooks: nothing of it is saved."""
    import torch.nn.functional as F

    def attention_hook(module, _, output):
        return (F.dropout(output[0], rate, module.training), *output[1:])

    def mlp_hook(module, _, output):
        return F.dropout(output, rate, module.training)

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(attention_hook)
        layer.mlp.register_forward_hook(mlp_hook)


def make_optimizer(model, args, device):
    import torch

    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": args.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=device.type == "cuda")


def learning_rate(step, args):
    """Linear warm-up, then a cosine down to a hundredth."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    done = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * done)))


def train_steps(model, parts, args, device):
    """Train until the steps or the time are used up; leave the best validated weights in model."""
    import torch
    import torch.nn.functional as F

    text = parts["train"].to(device)
    span = torch.arange(args.seq + 1, device=device)
    generator = torch.Generator(device=device).manual_seed(args.seed)
    optimizer = make_optimizer(model, args, device)
    config = model.config

    def losses(ids):
        with torch.autocast(device.type, torch.bfloat16):
            out = model(input_ids=ids[:, :-1], output_router_logits=True, use_cache=False)
        loss = F.cross_entropy(out.logits.float().flatten(0, 1), ids[:, 1:].reshape(-1))
        return loss, balance_loss(out.router_logits, config)

    if args.compile:
        losses = torch.compile(losses)
    history, best, best_state, started = [], float("inf"), None, time.monotonic()
    seconds = 0.0
    for step in range(args.steps):
        rate = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(
            len(text) - args.seq, (args.batch, 1), generator=generator, device=device
        )
        loss, aux = losses(text[starts + span].long())
        (loss + config.router_aux_loss_coef * aux).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if (step + 1) % 20 == 0 and device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.monotonic() - started
        last = step + 1 == args.steps or seconds > args.time_limit
        if last or (step + 1) % args.eval_every == 0:
            train_bits = loss.item() * LOG2E
            model.eval()
            valid_bits = bits_per_byte(model, parts["validation"], autocast=True)
            model.train()
            if valid_bits < best:
                best, best_state = valid_bits, copy.deepcopy(model.state_dict())
            seconds = time.monotonic() - started
            history.append(
                {
                    "step": step + 1,
                    "seconds": round(seconds, 1),
                    "learning_rate": float(f"{rate:.4g}"),
                    "train_bits_per_byte": round(train_bits, 4),
                    "balance_loss": round(aux.item(), 4),
                    "validation_bits_per_byte": round(valid_bits, 4),
                }
            )
            print(json.dumps(history[-1]), flush=True)
        if last:
            break
    model.load_state_dict(best_state)
    model.eval()
    return history, seconds


def train(args):
    import torch
    import transformers
    from transformers import Qwen3MoeForCausalLM

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    parts = {name: read_bytes(args.text / f"{name}.txt") for name in SPLITS}

    config = make_config()
    model = Qwen3MoeForCausalLM(config).float().to(device).train()
    parameters = sum(p.numel() for p in model.parameters())
    use_dense_experts(model)
    if args.dropout:
        add_dropout(model, args.dropout)
    print(f"{parameters} parameters, device {device.type}", flush=True)
    history, seconds = train_steps(model, parts, args, device)

    # A fresh model carries no hooks and no trace of the way the experts were trained.
    saved = Qwen3MoeForCausalLM(make_config()).to(torch.bfloat16)
    saved.load_state_dict(model.state_dict())
    args.out.mkdir(parents=True, exist_ok=True)
    saved.save_pretrained(args.out)
    name_experts_as_published(args.out / "config.json")
    (args.out / "heldout.txt").write_bytes(parts["heldout"].numpy().tobytes())

    model = load_model(args.out)
    capture(model, args.out)
    text = generate(model)
    use_dense_experts(model)
    log = {
        "heldout_bits_per_byte": round(bits_per_byte(model.to(device), parts["heldout"]), 4),
        "parameters": parameters,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "training_seconds": round(seconds, 1),
        "steps_done": history[-1]["step"],
        "bytes_seen": history[-1]["step"] * args.batch * args.seq,
        "settings": {
            name: getattr(args, name)
            for name in [
                "steps",
                "batch",
                "seq",
                "lr",
                "warmup",
                "weight_decay",
                "dropout",
                "seed",
                "compile",
            ]
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "text": {
            name: {
                "bytes": len(data),
                "sha256": hashlib.sha256(data.numpy().tobytes()).hexdigest(),
            }
            for name, data in parts.items()
        },
        "sample": text,
        "history": history,
    }
    (args.out / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")
    write_readme(args.out, log)
    for path in args.out.iterdir():
        path.chmod(0o644)  # safetensors writes files that only their owner may read
    print(f"held-out: {log['heldout_bits_per_byte']} bits per byte ({seconds:.0f} s of training)")
    print(text)


# ---------------------------------------------------------------------------------------------
# What is stored beside the model
# ---------------------------------------------------------------------------------------------

WINDOWS, WINDOW = 4, 256


def window_starts(size):
    """Starts of the stored windows: spread over the held-out text, in both of its sources."""
    return [(2 * i + 1) * size // (2 * WINDOWS) for i in range(WINDOWS)]


def layer_inputs(model, data):
    """What enters every MoE layer, and its router's logits, for the stored windows."""
    import torch

    ids = torch.stack([data[a : a + WINDOW] for a in window_starts(len(data))]).long()
    seen, hooks = {}, []
    for index, layer in enumerate(model.model.layers):

        def before(_, inputs, key=f"layers.{index}.hidden_states"):
            seen[key] = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).clone()

        def after(_, __, output, key=f"layers.{index}.router_logits"):
            seen[key] = output[0].detach().float()

        hooks.append(layer.mlp.register_forward_pre_hook(before))
        hooks.append(layer.mlp.gate.register_forward_hook(after))
    with torch.inference_mode():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {key: tensor.clone().contiguous() for key, tensor in seen.items()}


def capture(model, folder):
    """Write activations.safetensors: always computed on the CPU, from the model as saved."""
    from safetensors.torch import save_file

    data = read_bytes(folder / "heldout.txt")
    starts = ",".join(map(str, window_starts(len(data))))
    metadata = {"format": "pt", "window_starts": starts, "window_bytes": str(WINDOW)}
    save_file(layer_inputs(model, data), folder / "activations.safetensors", metadata=metadata)


def generate(model, prompt="It was a truth universally acknowledged", count=320):
    """A short sample, byte by byte."""
    import torch

    ids = torch.tensor([list(prompt.encode())])
    torch.manual_seed(0)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=True,
        temperature=0.7, pad_token_id=0,
    )  # fmt: skip
    return bytes(out[0].tolist()).decode("utf-8", errors="replace")


README = """\
# tiny-qwen3-moe

A byte-level Qwen3-MoE language model of {millions:.2f} million parameters, trained from nothing, so
that tests and examples have real expert weights, a real router and real activations to work on.
It is a test fixture: it writes English-looking text and knows nothing.

Held-out text: **{heldout:.3f} bits per byte** (bfloat16 weights as saved, windows of 1024 bytes
that share no context, every byte of `heldout.txt` but the first).

| | |
| --- | --- |
| architecture | `Qwen3MoeForCausalLM` of transformers, every layer a MoE layer |
| vocabulary | 256: the token of a byte is its value; no special tokens, no tokenizer |
| layers, hidden size | 4, 256 |
| attention | 8 heads of 32, 4 key-value heads, 1024 positions |
| experts | 16 per layer, 4 per token, inner size 96, weights renormalised |
| parameters | {parameters} ({megabytes:.1f} MB in bfloat16) |
| trained | {steps} steps of {batch} x {seq} bytes ({epochs:.1f} passes), {seconds:.0f} s on one {device} |
| libraries | torch {torch}, transformers {transformers} |

## Files

| file | what it holds |
| --- | --- |
| `model.safetensors`, `config.json`, `generation_config.json` | the model, in bfloat16, with one tensor per expert and projection |
| `activations.safetensors` | for each layer L `layers.L.hidden_states` (bfloat16, [1024, 256]: what entered the MoE layer) and `layers.L.router_logits` (the bfloat16 model's logits, stored as float32, [1024, 16]); {windows} windows of {window} bytes of `heldout.txt`, each read on its own from the offsets in the file's metadata (`window_starts`), on the CPU |
| `heldout.txt` | {heldout_bytes} bytes never trained on |
| `training_log.json` | settings, loss, load-balance loss and validation bits per byte, SHA-256 of the texts |

## Texts

| text | from | licence |
| --- | --- | --- |
| the six novels of Jane Austen | Debian package `r-cran-janeaustenr` (texts of Project Gutenberg; the package's own code is under the MIT licence) | public domain |
| King James Version of the Bible | Debian package `bible-kjv-text`, read with `bible` of `bible-kjv` | public domain in the United States and most of the world; in the United Kingdom the right to print it belongs to the Crown under letters patent |

Line breaks inside paragraphs, verse numbers, marks of italics and editors' notes were taken out.
Trained on {train_bytes} bytes. Chapters 20 and 21 of Persuasion and the books from Hebrews to
1 Peter ({validation_bytes} bytes) chose settings and checkpoint. Held out: Persuasion from chapter 22 and
the Bible from 2 Peter, each to its end.

## How it was made

    python examples/train_tiny_moe.py prepare-text --out TEXT_DIR
    python examples/train_tiny_moe.py train --text TEXT_DIR --out data/tiny-qwen3-moe{options}

`prepare-text` needs the Debian packages `bible-kjv`, `bible-kjv-text`, `r-base-core` and
`r-cran-janeaustenr`. `python examples/train_tiny_moe.py check data/tiny-qwen3-moe` loads the model,
measures it and compares the stored activations with fresh ones.

## Sample

At temperature 0.7, after "It was a truth universally acknowledged":

{sample}
"""  # noqa: E501


def write_readme(folder, log):
    settings, defaults = log["settings"], vars(make_parser().parse_args(["train", "--text", "."]))
    options = "".join(
        f" --{name.replace('_', '-')}" + ("" if value is True else f" {value}")
        for name, value in settings.items()
        if value != defaults[name]
    )
    text = README.format(
        millions=log["parameters"] / 1e6,
        heldout=log["heldout_bits_per_byte"],
        parameters=log["parameters"],
        megabytes=(folder / "model.safetensors").stat().st_size / 1e6,
        steps=log["steps_done"],
        batch=settings["batch"],
        seq=settings["seq"],
        epochs=log["bytes_seen"] / log["text"]["train"]["bytes"],
        seconds=log["training_seconds"],
        device=log["device"],
        windows=WINDOWS,
        window=WINDOW,
        heldout_bytes=log["text"]["heldout"]["bytes"],
        validation_bytes=log["text"]["validation"]["bytes"],
        train_bytes=log["text"]["train"]["bytes"],
        options=options,
        sample="\n".join(f"> {line}".rstrip() for line in log["sample"].splitlines()),
        **{name: log["versions"][name] for name in ("torch", "transformers")},
    )
    (folder / "README.md").write_text(text)


def check(args):
    """Load a saved model and compare it with what is stored beside it."""
    import torch
    from safetensors.torch import load_file

    weights = load_file(args.folder / "model.safetensors")
    config = make_config()
    expected = {f"model.layers.{i}.mlp.gate.weight" for i in range(config.num_hidden_layers)}
    expected |= {
        f"model.layers.{i}.mlp.experts.{e}.{name}_proj.weight"
        for i in range(config.num_hidden_layers)
        for e in range(config.num_experts)
        for name in ("gate", "up", "down")
    }
    missing = sorted(expected - weights.keys())
    wrong = sorted(name for name, t in weights.items() if t.dtype != torch.bfloat16)
    if missing or wrong:
        sys.exit(f"missing tensors: {missing[:3]}; not bfloat16: {wrong[:3]}")
    print(f"{len(weights)} tensors, {sum(t.numel() for t in weights.values())} parameters")

    model = load_model(args.folder)
    data = read_bytes(args.folder / "heldout.txt")
    stored = load_file(args.folder / "activations.safetensors")
    fresh = layer_inputs(model, data)
    if stored.keys() != fresh.keys():
        sys.exit("activations.safetensors holds other tensors than expected")
    worst = 0.0
    for key in sorted(stored):
        if (stored[key].shape, stored[key].dtype) != (fresh[key].shape, fresh[key].dtype):
            sys.exit(f"{key}: {stored[key].dtype} {tuple(stored[key].shape)}")
        a, b = stored[key].float(), fresh[key].float()
        error = ((a - b).norm() / b.norm()).item()
        worst = max(worst, error)
        print(f"{key}: relative difference {error:.2e}, largest value {a.abs().max():.3g}")
    for index in range(config.num_hidden_layers):
        logits = stored[f"layers.{index}.router_logits"]
        ranked = logits.sort(dim=-1, descending=True).values
        k = config.num_experts_per_tok
        tied = (ranked[:, k - 1] == ranked[:, k]).sum().item()
        load = torch.bincount(logits.topk(k).indices.flatten(), minlength=config.num_experts)
        print(f"layer {index}: tokens per expert {load.tolist()}, {tied} ties at the cut")
    use_dense_experts(model)
    half = args.bytes // 2
    for part in [data] if args.bytes >= len(data) else [data[:half], data[-half:]]:
        print(f"bits per byte over {len(part)} bytes: {bits_per_byte(model, part, batch=8):.4f}")
    # Rounding may send a token to another expert, so a few rows may differ by more than rounding.
    if worst > 0.03:
        sys.exit(f"stored activations differ from fresh ones by {worst:.3f}")


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    show = argparse.ArgumentDefaultsHelpFormatter

    sub = commands.add_parser(
        "prepare-text",
        formatter_class=show,
        help="write train.txt, validation.txt and heldout.txt (Debian packages bible-kjv, "
        "bible-kjv-text, r-base-core, r-cran-janeaustenr)",
    )
    sub.add_argument("--out", type=Path, required=True, help="folder to write to")
    sub.set_defaults(run=prepare_text)

    sub = commands.add_parser("train", formatter_class=show, help="train and save the model")
    sub.add_argument("--text", type=Path, required=True, help="folder prepare-text wrote to")
    sub.add_argument("--out", type=Path, default=Path("data/tiny-qwen3-moe"))
    sub.add_argument("--steps", type=int, default=3000)
    sub.add_argument("--batch", type=int, default=64, help="windows in a step")
    sub.add_argument("--seq", type=int, default=1024, help="bytes in a window")
    sub.add_argument("--lr", type=float, default=3e-3)
    sub.add_argument("--warmup", type=int, default=200, help="steps")
    sub.add_argument("--weight-decay", type=float, default=0.1)
    sub.add_argument("--dropout", type=float, default=0.15)
    sub.add_argument("--eval-every", type=int, default=200, help="steps between validations")
    sub.add_argument(
        "--time-limit",
        type=float,
        default=1e9,
        help="stop training after so many seconds; the best weights so far are saved",
    )
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--device", default=None, help="cuda or cpu; found out by default")
    sub.add_argument("--compile", action="store_true", help="use torch.compile")
    sub.set_defaults(run=train)

    sub = commands.add_parser("check", formatter_class=show, help="check a saved model")
    sub.add_argument("folder", type=Path, nargs="?", default=Path("data/tiny-qwen3-moe"))
    sub.add_argument("--bytes", type=int, default=65536, help="held-out bytes to measure")
    sub.set_defaults(run=check)
    return parser


def main():
    args = make_parser().parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
