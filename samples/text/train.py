"""Rebuild model.safetensors, devil.safetensors and held_out.safetensors from one book.

The book is Ambrose Bierce's The Devil's Dictionary, as Debian's `dict-devil` installs it (apt
install, or unpack with `dpkg-deb -x` and point --data at its devil.dict.dz). One core is enough.
"""

import argparse
import gzip
import math
from pathlib import Path

import torch
from net import VOCABULARY, CharTransformer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

HERE = Path(__file__).parent
CONTEXT = 64


def read_book(path: Path) -> Tensor:
    """Read the book as tokens, without the archive's header and the alphabet it ends with."""
    text = gzip.decompress(path.read_bytes()).decode("ascii")
    start = text.index("PREFACE")
    end = text.index("\n\n", text.index("\nZOOLOGY"))
    index = {character: token for token, character in enumerate(VOCABULARY)}
    return torch.tensor([index[character] for character in text[start:end]], dtype=torch.uint8)


def windows(tokens: Tensor, offset: int = 0) -> Tensor:
    """Cut the tokens from `offset` on into rows of CONTEXT + 1: an input and what follows it."""
    return tokens[offset:].unfold(0, CONTEXT + 1, CONTEXT)


def loss_of(net: nn.Module, rows: Tensor) -> Tensor:
    """Return the mean cross-entropy of each next character, in nats."""
    return cross_entropy(net(rows[:, :-1]).flatten(0, 1), rows[:, 1:].long().flatten())


@torch.no_grad()
def evaluate(net: nn.Module, tokens: Tensor) -> float:
    """Return the loss over all the tokens."""
    net.eval()
    batches = windows(tokens).split(128)
    total = sum(len(rows) * loss_of(net, rows).item() for rows in batches)
    return total / sum(map(len, batches))


def save_sample(path: Path, tokens: Tensor, count: int, seed: int) -> None:
    """Write a simple random sample of the windows, inputs and targets already shifted by one."""
    rows = windows(tokens)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]]
    tensors = {"tokens": rows[:, :-1].contiguous(), "next_tokens": rows[:, 1:].long().contiguous()}
    save_file(tensors, path)


def main() -> None:
    """Train on the first nine tenths of the book and write the three files beside this script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default="/usr/share/dictd/devil.dict.dz")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)  # the same sums, hence the same weights, on any number of cores
    torch.manual_seed(args.seed)
    book = read_book(args.data)
    seen, unseen = book.tensor_split([len(book) * 9 // 10])

    net = CharTransformer(context=CONTEXT)
    for table in net.characters, net.positions:
        nn.init.normal_(table.weight, std=0.1)
    optimizer = torch.optim.AdamW(
        net.parameters(), args.lr, betas=(0.9, 0.98), weight_decay=args.weight_decay
    )
    steps = args.epochs * math.ceil(len(windows(seen)) / args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    for epoch in range(1, args.epochs + 1):
        net.train()
        rows = windows(seen, offset=int(torch.randint(CONTEXT, ())))  # cut anew each time
        for batch in torch.randperm(len(rows)).split(args.batch_size):
            optimizer.zero_grad()
            loss_of(net, rows[batch]).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        if epoch % 5 == 0 or epoch == args.epochs:
            losses = f"training loss {evaluate(net, seen):.4f}  unseen {evaluate(net, unseen):.4f}"
            print(f"epoch {epoch:2d}  {losses}  nats per character", flush=True)

    save_file(net.state_dict(), HERE / "model.safetensors")
    save_sample(HERE / "devil.safetensors", seen, 512, args.seed)
    save_sample(HERE / "held_out.safetensors", unseen, 128, args.seed)


if __name__ == "__main__":
    main()
