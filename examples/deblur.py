"""Deblur a photograph by a learned fixed point.

A photograph was blurred by H and has noise: y = H x + e. Half-quadratic splitting asks for the
picture that is both near what a denoiser D makes of it and true to y,

    z = (H^T H + rho)^-1 (H^T y + rho D(z)),

and its iteration is a plug-and-play method (Venkatakrishnan et al. 2013; Zhang et al. 2021, arXiv
2008.13751). Here the equilibrium itself is trained (Gilton et al. 2021, arXiv 2102.07944): D is a
fixed smoothing and a small network of 2,600 weights, which learns from pieces of four photographs
of scikit-image by implicit gradients. It is tried on a fifth, beside scikit-image's Wiener filter
and Richardson-Lucy deconvolution, each with its best setting on that very photograph, an advantage
that ours does not have.

    python examples/deblur.py [--small] [--out FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from skimage import color, data, restoration, transform
from torch import Tensor, nn
from tqdm import tqdm

import deqcore
from deqcore.normalization import spectral_normalize

NOISE, BLUR = 0.01, 1.8  # standard deviations, of grey in [0, 1] and in pixels


def gaussian(shape: torch.Size | tuple[int, int], sigma: float) -> Tensor:
    """The transfer function of a periodic Gaussian blur, for ``rfft2`` of such pictures."""
    rows, columns = torch.fft.fftfreq(shape[0])[:, None], torch.fft.rfftfreq(shape[1])
    return torch.exp(-2 * (torch.pi * sigma) ** 2 * (rows**2 + columns**2))


def filtered(x: Tensor, transfer: Tensor) -> Tensor:  # (..., H, W)
    return torch.fft.irfft2(torch.fft.rfft2(x) * transfer, s=x.shape[-2:])


def blurred(x: Tensor) -> Tensor:
    return filtered(x, gaussian(x.shape[-2:], BLUR)) + NOISE * torch.randn_like(x)


def psnr(x: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, of pictures in [0, 1], without 8 pixels at the borders."""
    inner = (x.clamp(0, 1) - truth)[..., 8:-8, 8:-8]
    return float(-10 * inner.square().mean().log10())


class Cell(nn.Module):
    """z -> (H^T H + rho)^-1 (H^T y + rho D(z))."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.log_rho = nn.Parameter(torch.tensor(-4.0))
        self.network = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, padding_mode="circular"),
            nn.Softplus(beta=10),
            nn.Conv2d(width, width, 3, padding=1, padding_mode="circular"),
            nn.Softplus(beta=10),
            nn.Conv2d(width, 1, 3, padding=1, padding_mode="circular"),
        )
        with torch.no_grad():  # D starts as smoothing: a contraction
            for parameter in self.network[-1].parameters():
                parameter.zero_()
        spectral_normalize(self.network, bound=0.8)  # and does not go far from one

    def denoised(self, z: Tensor) -> Tensor:
        smooth = filtered(z, gaussian(z.shape[-2:], 0.5))
        return smooth + self.network(z.unsqueeze(1)).squeeze(1)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:  # (B, H, W), (B, H, W) -> (B, H, W)
        rho = self.log_rho.exp()
        transfer = gaussian(y.shape[-2:], BLUR)
        observed = torch.fft.rfft2(y) * transfer
        wanted = observed + rho * torch.fft.rfft2(self.denoised(z))
        return torch.fft.irfft2(wanted / (transfer**2 + rho), s=y.shape[-2:])


def photographs() -> tuple[list[Tensor], Tensor]:
    """Four for training, and the one to be tried, (256, 256)."""
    names = ("chelsea", "coffee", "astronaut", "rocket")
    grey = [color.rgb2gray(getattr(data, name)()) for name in names]
    half = [transform.rescale(picture, 0.5, anti_aliasing=True) for picture in grey]
    test = transform.resize(data.camera(), (256, 256), anti_aliasing=True)
    return [torch.tensor(picture).float() for picture in half], torch.tensor(test).float()


def pieces(pictures: list[Tensor], count: int, side: int) -> Tensor:
    """Random squares (count, side, side), each of a random picture."""
    found = []
    for which in torch.randint(0, len(pictures), (count,)):
        picture = pictures[which]
        top, left = (int(torch.randint(0, size - side + 1, ())) for size in picture.shape)
        found.append(picture[top : top + side, left : left + side])
    return torch.stack(found)


def train(layer: deqcore.ImplicitLayer, pictures: list[Tensor], steps: int) -> None:
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in (bar := tqdm(range(steps), desc="training", leave=False)):
        truth = pieces(pictures, 4, 48)
        optimizer.zero_grad()
        loss = F.mse_loss(layer(blurred(truth)), truth)
        loss.backward()
        nn.utils.clip_grad_norm_(layer.parameters(), 0.1)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.2e}")


def classic(y: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """scikit-image's deconvolutions, with the setting that is best for this picture."""
    across = torch.arange(-8, 9.0)
    weights = torch.exp(-(across[:, None] ** 2 + across**2) / (2 * BLUR**2)).double()
    kernel = (weights / weights.sum()).numpy()
    picture = y.double().numpy()
    tried: dict[str, list[Any]] = {
        "Wiener": [restoration.wiener(picture, kernel, 10**p) for p in (-2, -1.5, -1, -0.5, 0)],
        "Richardson-Lucy": [
            restoration.richardson_lucy(picture.clip(0, 1), kernel, num_iter=n)
            for n in (5, 10, 20, 40)
        ],
    }
    return {
        name: max((torch.tensor(z).float() for z in found), key=lambda z: psnr(z, truth))
        for name, found in tried.items()
    }


def draw(folder: Path, pictures: dict[str, Tensor], truth: Tensor, trace: list[float]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 2.9), layout="constrained")
    axes = figure.subplots(1, 5, width_ratios=[1, 1, 1, 1, 1.15])
    shown = {name: picture for name, picture in pictures.items() if name != "Richardson-Lucy"}
    for axis, (name, picture) in zip(axes, [*shown.items(), ("photograph", truth)], strict=False):
        axis.imshow(picture[20:148, 60:188], cmap="gray", vmin=0, vmax=1)
        level = "" if name == "photograph" else f", {psnr(picture, truth):.1f} dB"
        axis.set_title(name + level)
        axis.axis("off")
    axes[4].plot(range(1, len(trace) + 1), trace, "o-", color="#009E73")
    axes[4].set(xlabel="plain evaluations from y", title="PSNR (dB)")
    axes[4].spines[["top", "right"]].set_visible(False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "deblur.png", dpi=80)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="fewer steps, a few seconds")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for deblur.png")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    training, truth = photographs()
    cell = Cell()
    layer = deqcore.ImplicitLayer(cell, solver=deqcore.Anderson(rtol=1e-4, max_steps=100))
    y = blurred(truth)
    with torch.no_grad():
        before = layer(y[None])[0]
    train(layer, training, 5 if options.small else 200)
    with torch.no_grad():
        ours = layer(y[None], z0=y[None])[0]
    assert layer.report is not None
    layer.report.raise_for_status()
    pictures = {"blurred": y, **classic(y, truth), "equilibrium": ours}
    figures = {name: psnr(picture, truth) for name, picture in pictures.items()}
    figures["untrained"] = psnr(before, truth)
    for name, level in figures.items():
        print(f"{name:16} {level:5.2f} dB")
    print(f"{layer.report.steps.item()} evaluations, residual {layer.report.residual.item():.1e}")
    if options.out is not None:
        z, trace = y[None], []
        with torch.no_grad():
            for _ in range(20):
                z = cell(z, y[None])
                trace.append(psnr(z[0], truth))
        draw(options.out, pictures, truth, trace)
    return figures


if __name__ == "__main__":
    main()
