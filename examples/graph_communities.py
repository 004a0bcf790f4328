"""An implicit graph network finds communities from few known members, too far for two layers.

Random graphs of three communities (a stochastic block model) in which 12 of 300 nodes are known.
A graph convolution (GCN; Kipf and Welling 2017, arXiv 1609.02907) of two layers sees two links far,
and most nodes have no known one that near. The implicit network (in the manner of Gu et al. 2020,
arXiv 2009.06211) is the equilibrium of one layer and sees the whole graph. Training and test graphs
are drawn anew: nothing can be remembered.

A node's equation contains its neighbours' states, so the rows depend on each other:
``batch="coupled"`` makes of all of them one problem, gradients included.

    python examples/graph_communities.py [--small] [--out FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import deqcore
from deqcore.normalization import spectral_normalize

CLASSES, NODES, KNOWN = 3, 300, 12
INSIDE, OUTSIDE = 5.0, 0.4  # links of a node with its own community, and with the others


class Graph(NamedTuple):
    adjacency: Tensor  # (N, N), 0 or 1, with self-loops
    features: Tensor  # (N, CLASSES), centred one-hot of known nodes, zero elsewhere
    labels: Tensor  # (N,)
    known: Tensor  # bool (N,)

    @property
    def propagation(self) -> Tensor:
        """D^-1/2 A D^-1/2, of spectral norm 1."""
        scale = self.adjacency.sum(1).rsqrt()
        return scale[:, None] * self.adjacency * scale


def random_graph() -> Graph:
    labels = torch.arange(NODES) % CLASSES
    own = labels[:, None] == labels
    size = NODES / CLASSES
    link = torch.rand(NODES, NODES) < torch.where(own, INSIDE / size, OUTSIDE / (NODES - size))
    link = link.triu(1)
    known = torch.zeros(NODES, dtype=torch.bool)
    known[torch.randperm(NODES)[:KNOWN]] = True
    features = (F.one_hot(labels, CLASSES) - 1 / CLASSES) * known[:, None]
    return Graph((link | link.T).float() + torch.eye(NODES), features, labels, known)


class Cell(nn.Module):
    """Z -> tanh(P Z W + X), a contraction: P has norm 1 and W less."""

    def __init__(self, width: int) -> None:
        super().__init__()
        mix = nn.Linear(width, width, bias=False)
        with torch.no_grad():  # near label propagation, where W is the identity
            mix.weight.copy_(torch.eye(width) + 0.1 * torch.randn(width, width) / width**0.5)
        self.mix = spectral_normalize(mix, bound=0.95, iterations=5)

    def forward(self, z: Tensor, x: Tensor, propagation: Tensor) -> Tensor:
        return torch.tanh(propagation @ self.mix(z) + x)


class ImplicitGraphNetwork(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(CLASSES, width, bias=False)
        solver = deqcore.Anderson(rtol=1e-3, max_steps=100)
        self.body = deqcore.ImplicitLayer(
            Cell(width), solver, deqcore.Implicit(solver=solver), batch="coupled"
        )
        self.read = nn.Linear(width, CLASSES)

    def forward(self, graph: Graph) -> Tensor:
        return self.read(self.body(self.embed(graph.features), graph.propagation))


class GCN(nn.Module):
    def __init__(self, depth: int, width: int = 16) -> None:
        super().__init__()
        sizes = [CLASSES] + depth * [width]
        self.layers = nn.ModuleList(map(nn.Linear, sizes[:-1], sizes[1:]))
        self.read = nn.Linear(width, CLASSES)

    def forward(self, graph: Graph) -> Tensor:
        z = graph.features
        for layer in self.layers:
            z = torch.relu(graph.propagation @ layer(z))
        return self.read(z)


def train(model: nn.Module, steps: int, label: str) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(steps), desc=label, leave=False):
        graph = random_graph()
        optimizer.zero_grad()
        unknown = ~graph.known
        F.cross_entropy(model(graph)[unknown], graph.labels[unknown]).backward()
        optimizer.step()
        schedule.step()


def hops_to_known(graph: Graph) -> Tensor:
    """Links from each node to the nearest known one; -1 where there is no way."""
    hops = torch.where(graph.known, 0, -1)
    reached = graph.known.float()
    for distance in range(1, NODES):
        spread = (graph.adjacency @ reached > 0).float()
        if torch.equal(spread, reached):
            break
        hops[(spread > 0) & (hops < 0)] = distance
        reached = spread
    return hops


def right_answers(model: nn.Module, graphs: list[Graph]) -> tuple[Tensor, Tensor]:
    """Of the unknown nodes of all graphs: is the answer right, and how far is a known one."""
    with torch.no_grad():
        right = [model(graph).argmax(1) == graph.labels for graph in graphs]
    unknown = torch.cat([~graph.known for graph in graphs])
    return torch.cat(right)[unknown], torch.cat([hops_to_known(g) for g in graphs])[unknown]


def draw(folder: Path, graph: Graph, models: dict[str, nn.Module], curves: dict[str, Any]) -> None:
    import networkx
    from matplotlib.figure import Figure

    colours = ["#0072B2", "#E69F00", "#009E73"]
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    *maps, plot = figure.subplots(1, 3, width_ratios=[1, 1, 0.9])
    network = networkx.from_numpy_array((graph.adjacency - torch.eye(NODES)).numpy())
    parts: list[list[int]] = [sorted(part) for part in networkx.connected_components(network)]
    component = max(parts, key=len)
    network = network.subgraph(component)
    places = networkx.spring_layout(network, seed=1, iterations=80, k=0.09)
    x, y = torch.tensor([[*places[node]] for node in component]).T
    for axes, name in zip(maps, ("GCN of 2 layers", "implicit"), strict=True):
        with torch.no_grad():
            answers = models[name](graph).argmax(1)[component]
        for a, b in network.edges:
            axes.plot(*zip(places[a], places[b], strict=True), color="#cccccc", lw=0.5, zorder=0)
        right = answers == graph.labels[component]
        known = graph.known[component]
        of = [colours[answer] for answer in answers]
        axes.scatter(x, y, s=18, c=of, linewidths=0)
        wrong = ~right & ~known
        axes.scatter(x[wrong], y[wrong], s=22, marker="x", color="black", linewidths=1.2)
        axes.scatter(x[known], y[known], s=95, marker="*", c="white", edgecolors="black")
        axes.set_title(f"{name}: {int(wrong.sum())} of {int((~known).sum())} wrong (crosses)")
        axes.axis("off")
    for (name, curve), colour in zip(curves.items(), colours, strict=True):
        plot.plot(range(1, len(curve) + 1), 100 * curve, "o-", color=colour, label=name)
    plot.axhline(100 / CLASSES, color="grey", ls=":", label="guessing")
    plot.set(xlabel="links to the nearest known node (stars)", ylabel="right answers (%)")
    plot.set(ylim=(0, 104), xticks=range(1, 5))
    plot.legend(frameon=False, loc="lower left")
    plot.spines[["top", "right"]].set_visible(False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "graph_communities.png", dpi=80)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="fewer steps and graphs, seconds")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for graph_communities.png")
    options = parser.parse_args(arguments)

    torch.manual_seed(1)
    test = [random_graph() for _ in range(4 if options.small else 30)]
    models: dict[str, nn.Module] = {}
    curves, figures = {}, {}
    for name in ("GCN of 2 layers", "GCN of 4 layers", "implicit"):
        torch.manual_seed(0)
        model: nn.Module
        model = ImplicitGraphNetwork() if name == "implicit" else GCN(int(name[7]))
        train(model, 25 if options.small else 300, name)
        right, hops = right_answers(model, test)
        curves[name] = torch.stack([right[hops == k].double().mean() for k in range(1, 5)])
        models[name], figures[name] = model, float(right.double().mean())
        print(
            f"{name:15} {sum(p.numel() for p in model.parameters()):4} parameters, right: "
            f"{figures[name]:.1%}; by links to a known node "
            + ", ".join(f"{k}: {share:.0%}" for k, share in enumerate(curves[name], start=1))
        )
    assert isinstance(model, ImplicitGraphNetwork)
    assert model.body.report is not None
    model.body.report.raise_for_status()
    print(f"last solve: one problem of {NODES} nodes, {model.body.report.steps.item()} evaluations")
    if options.out is not None:
        shares = torch.stack([right_answers(model, [graph])[0].double().mean() for graph in test])
        middle = int(shares.argsort()[len(test) // 2])  # neither the best nor the worst of them
        draw(options.out, test[middle], models, curves)
    return figures


if __name__ == "__main__":
    main()
