"""A causal language model of `transformers`, tuned by forward passes alone, at the memory of inference:

python examples/zeroth_order_language_model.py
python examples/zeroth_order_language_model.py --model FOLDER --text FILE --dtype bfloat16

The first makes a tiny model from a config and pre-trains it on this repository's README by back-propagation, so that
there is something to tune; FOLDER is one with a model's weights and tokenizer. Where back-propagation with
checkpointing fits into the memory, it is more accurate and cheaper.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from lgkernels.optim import ZerothOrder

ROOT = Path(__file__).resolve().parents[1]


def tiny_model():
    """Bytes are its tokens."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=256, **sizes))


def byte_tokens(path):
    return torch.tensor(list(path.read_bytes()))


def batches(tokens, length, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(tokens) - length, (size,), generator=generator)
        yield torch.stack([tokens[start : start + length] for start in starts])


def pretrain(model, tokens, steps):
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _, batch in zip(range(steps), batches(tokens, 64, 16)):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def tune(model, tokens, steps, lr, eps, members, length=64, size=16):
    """Returns the optimizer, whose log rebuilds the tuned weights from those that it began with."""
    model.requires_grad_(False).eval()
    optimizer = ZerothOrder(model, lr, eps=eps, members=members, law="sign")
    for step, batch in zip(range(steps), batches(tokens, length, size, seed=1)):
        loss = optimizer.step(lambda batch=batch: model(input_ids=batch, labels=batch).loss)
        if step % 50 == 0:
            print(f"  step {step:4d}: loss {loss:.3f}")
    return optimizer


@torch.no_grad()
def loss_of(model, tokens, length=64, size=16):
    found = [model(input_ids=b, labels=b).loss for _, b in zip(range(8), batches(tokens, length, size, seed=2))]
    return torch.stack(found).mean().item()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder with weights; default: a tiny model")
    parser.add_argument("--text", type=Path, default=ROOT / "LICENSE", help="what it is tuned on")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=None, help="default: 1e-3 of the tiny model, 1e-6 of another")
    parser.add_argument("--eps", type=float, default=1e-3)
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--pretrain", type=int, default=150, help="steps of the tiny model's pre-training")
    given = parser.parse_args(arguments)
    if given.model is None:
        model, tokens = tiny_model(), byte_tokens(given.text)
        pretrain(model, byte_tokens(ROOT / "README.md"), given.pretrain)
    else:
        model = AutoModelForCausalLM.from_pretrained(given.model)
        tokenizer = AutoTokenizer.from_pretrained(given.model)
        tokens = tokenizer(given.text.read_text(), return_tensors="pt").input_ids[0]
    model = model.to(getattr(torch, given.dtype)).eval()
    before = loss_of(model, tokens)
    lr = given.lr or (1e-3 if given.model is None else 1e-6)
    optimizer = tune(model, tokens, given.steps, lr, given.eps, given.members)
    after = loss_of(model, tokens)
    size = len(optimizer.log.to_bytes())
    print(f"loss {before:.3f} -> {after:.3f}; the log of {given.steps} steps takes {size:,} bytes")
    return before, after


if __name__ == "__main__":
    main()
