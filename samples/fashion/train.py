"""Rebuild model.pt, fashion.safetensors and held_out.safetensors from Fashion-MNIST.

The four gzipped IDX files come with Debian's `dataset-fashion-mnist` (apt install, or unpack with
`dpkg-deb -x` and point --data there), or from github.com/zalandoresearch/fashion-mnist. One core
is enough.
"""

import argparse
import gzip
import math
from pathlib import Path

import torch
from net import FashionNet
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

HERE = Path(__file__).parent
WIDTH = 16


def read_idx(path: Path) -> Tensor:
    """Read a gzipped IDX file of bytes: its magic number ends in the number of dimensions."""
    raw = bytearray(gzip.decompress(path.read_bytes()))
    header = 4 + 4 * raw[3]
    shape = [int.from_bytes(raw[at : at + 4], "big") for at in range(4, header, 4)]
    return torch.frombuffer(raw, dtype=torch.uint8, offset=header).reshape(shape)


def read_split(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Read the images (bytes) and labels (int64) of `train` or `t10k`."""
    images = read_idx(folder / f"{split}-images-idx3-ubyte.gz")
    return images, read_idx(folder / f"{split}-labels-idx1-ubyte.gz").long()


@torch.no_grad()
def evaluate(net: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the mean cross-entropy and the accuracy, with batch norm's running statistics."""
    net.eval()
    logits = torch.cat([net(batch) for batch in images.split(1000)])
    accuracy = (logits.argmax(1) == labels).double().mean()
    return cross_entropy(logits, labels).item(), accuracy.item()


def save_sample(path: Path, images: Tensor, labels: Tensor, count: int, seed: int) -> None:
    """Write a simple random sample, so that error bars computed from it are the textbook's."""
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:count]
    save_file({"images": images[chosen], "labels": labels[chosen]}, path)


def main() -> None:
    """Train, report each epoch, and write the three files beside this script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)  # the same sums, hence the same weights, on any number of cores
    torch.manual_seed(args.seed)
    images, labels = read_split(args.data, "train")
    unseen = read_split(args.data, "t10k")

    net = FashionNet(WIDTH).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        net.parameters(), args.lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay
    )
    steps = args.epochs * math.ceil(len(labels) / args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=steps, pct_start=0.15, cycle_momentum=False
    )
    for epoch in range(1, args.epochs + 1):
        net.train()
        for batch in torch.randperm(len(labels)).split(args.batch_size):
            optimizer.zero_grad()
            cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
        loss, accuracy = evaluate(net, *unseen)
        print(f"epoch {epoch:2d}  test loss {loss:.4f}  accuracy {accuracy:.2%}", flush=True)
    loss, accuracy = evaluate(net, images, labels)
    print(f"training loss {loss:.4f}  accuracy {accuracy:.2%}")

    del args.data  # where the images lay is no part of the recipe
    checkpoint = {
        "model_state_dict": net.to(memory_format=torch.contiguous_format).state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "epoch": args.epochs,
        "args": args,
    }
    torch.save(checkpoint, HERE / "model.pt")
    save_sample(HERE / "fashion.safetensors", images, labels, 2000, args.seed)
    save_sample(HERE / "held_out.safetensors", *unseen, 500, args.seed)


if __name__ == "__main__":
    main()
