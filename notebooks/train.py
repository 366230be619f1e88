"""Train a small classifier on two spirals; on the GPU that the queue gave, or on the CPU."""

from __future__ import annotations

import argparse
import os

import torch
from torch import nn


def spirals(points: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Points in the plane and which of two spirals each lies on; no straight line parts them."""
    labels = torch.arange(points) % 2
    turn = torch.rand(points, generator=generator).sqrt() * 3.0
    angle = turn * torch.pi + labels * torch.pi
    at = torch.stack((turn * angle.cos(), turn * angle.sin()), dim=1) / 3.0
    return at + 0.02 * torch.randn(points, 2, generator=generator), labels


def model() -> nn.Module:
    """Two numbers in, two classes out."""
    return nn.Sequential(
        nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2)
    )


def accuracy(net: nn.Module, at: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of points that are put on the right spiral."""
    with torch.no_grad():
        return (net(at).argmax(dim=1) == labels).float().mean().item()


def train(epochs: int, lr: float, seed: int = 0, report: int = 100) -> tuple[nn.Module, float]:
    """A trained model, and its accuracy on points that it has never seen."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    at, labels = (part.to(device) for part in spirals(2000, generator))
    net = model().to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    for epoch in range(1, epochs + 1):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(at), labels)
        loss.backward()
        optimizer.step()
        if epoch % report == 0:
            print(f"epoch {epoch:4d}  loss {loss.item():.4f}", flush=True)
    unseen = [part.to(device) for part in spirals(1000, generator)]
    return net, accuracy(net, unseen[0], unseen[1])


def main() -> None:
    """Train as the command line says, and keep the weights when asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=400)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--out", help="where the weights go")
    asked = parser.parse_args()
    print(f"job {os.environ.get('GPUSCHED_JOB_ID', '-')}, GPU {os.environ['CUDA_VISIBLE_DEVICES']}")
    torch.set_num_threads(1)
    net, share = train(asked.epochs, asked.lr)
    print(f"lr {asked.lr}: accuracy {share:.3f}")
    if asked.out:
        torch.save(net.state_dict(), asked.out)


if __name__ == "__main__":
    main()
