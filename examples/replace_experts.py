#!/usr/bin/env python3
"""Let a Hugging Face model write with INT8 experts, and compare with its own.

python examples/replace_experts.py [MODEL_FOLDER] [SCHEME]
"""

import sys
from pathlib import Path

import torch
from octomoe.transformers import replace_experts
from transformers import AutoModelForCausalLM

DEFAULT = Path(__file__).resolve().parents[1] / "data" / "tiny-qwen3-moe"
PROMPT = b"It was a truth universally acknowledged"


def write(model, prompt: bytes, count: int = 60) -> str:
    """The bundled model reads and writes bytes: a token is a byte."""
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
    return bytes(made[0].tolist()).decode(errors="replace")


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT
    scheme = sys.argv[2] if len(sys.argv) > 2 else "int8_channel"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    print(f"float32:\n  {write(model, PROMPT)}")
    with replace_experts(model, scheme) as replaced:
        print(f"{replaced}:\n  {write(model, PROMPT)}")


if __name__ == "__main__":
    main()
