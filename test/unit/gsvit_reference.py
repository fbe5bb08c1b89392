# SPDX-License-Identifier: Apache-2.0
"""An independent GSViT for tests, with the parameter names of the released checkpoint.

Written from the description of EfficientViT (arXiv 2305.07027) and of GSViT's autoencoder; it shares no code
with timm or with surg_perception, so that agreement with `load_gsvit` means something. The flat order of the
stages (blocks of a stage follow its three downsampling modules) and the names are those of the original.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def conv_bn(inp: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    pair = nn.Sequential()
    pair.add_module("c", nn.Conv2d(inp, out, kernel, stride, kernel // 2, groups=groups, bias=False))
    pair.add_module("bn", nn.BatchNorm2d(out))
    return pair


class Add(nn.Module):
    def __init__(self, m):
        super().__init__()
        self.m = m

    def forward(self, x):
        return x + self.m(x)


class Ffn(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.pw1, self.pw2 = conv_bn(dim, 2 * dim), conv_bn(2 * dim, dim)

    def forward(self, x):
        return self.pw2(F.relu(self.pw1(x)))


class Se(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(dim, dim // 4, 1), nn.Conv2d(dim // 4, dim, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class Merge(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        hidden = 4 * dim
        self.conv1, self.conv2 = conv_bn(dim, hidden), conv_bn(hidden, hidden, 3, 2, groups=hidden)
        self.se, self.conv3 = Se(hidden), conv_bn(hidden, out)

    def forward(self, x):
        return self.conv3(self.se(F.relu(self.conv2(F.relu(self.conv1(x))))))


class Attention(nn.Module):
    """Cascaded group attention: head i sees its share of the channels plus the output of head i - 1."""

    def __init__(self, dim, heads, resolution, kernels, key_dim=16):
        super().__init__()
        self.key_dim, self.value_dim = key_dim, dim // heads
        self.qkvs = nn.ModuleList(conv_bn(dim // heads, 2 * key_dim + self.value_dim) for _ in range(heads))
        self.dws = nn.ModuleList(conv_bn(key_dim, key_dim, kernels[i], groups=key_dim) for i in range(heads))
        self.proj = nn.Sequential(nn.ReLU(), conv_bn(dim, dim))
        self.attention_biases = nn.Parameter(torch.zeros(heads, resolution**2))
        index = torch.arange(resolution)
        rows, columns = (grid.flatten() for grid in torch.meshgrid(index, index, indexing="ij"))
        offsets = (rows[:, None] - rows).abs() * resolution + (columns[:, None] - columns).abs()
        self.register_buffer("attention_bias_idxs", offsets)

    def forward(self, x):
        n, _, height, width = x.shape
        carried, outputs = 0, []
        for i, share in enumerate(x.chunk(len(self.qkvs), 1)):
            q, k, v = self.qkvs[i](share + carried).split([self.key_dim, self.key_dim, self.value_dim], 1)
            q = self.dws[i](q)
            scores = torch.einsum("ncq,nck->nqk", q.flatten(2), k.flatten(2)) / self.key_dim**0.5
            weights = torch.softmax(scores + self.attention_biases[i, self.attention_bias_idxs], -1)
            carried = torch.einsum("nqk,nck->ncq", weights, v.flatten(2)).reshape(n, -1, height, width)
            outputs.append(carried)
        return self.proj(torch.cat(outputs, 1))


class Window(nn.Module):
    def __init__(self, dim, heads, resolution, kernels, window=7):
        super().__init__()
        self.size = min(window, resolution)
        self.attn = Attention(dim, heads, self.size, kernels)

    def forward(self, x):
        _, _, height, width = x.shape
        out = torch.empty_like(x)
        for top in range(0, height, self.size):
            for left in range(0, width, self.size):
                cell = (..., slice(top, top + self.size), slice(left, left + self.size))
                out[cell] = self.attn(x[cell])
        return out


class Block(nn.Module):
    def __init__(self, dim, heads, resolution, kernels):
        super().__init__()
        self.dw0, self.ffn0 = Add(conv_bn(dim, dim, 3, groups=dim)), Add(Ffn(dim))
        self.mixer = Add(Window(dim, heads, resolution, kernels))
        self.dw1, self.ffn1 = Add(conv_bn(dim, dim, 3, groups=dim)), Add(Ffn(dim))

    def forward(self, x):
        return self.ffn1(self.dw1(self.mixer(self.ffn0(self.dw0(x)))))


def local_pair(dim):
    return nn.Sequential(Add(conv_bn(dim, dim, 3, groups=dim)), Add(Ffn(dim)))


# embedding widths, blocks, heads per stage and depthwise kernels per head: Table 1 of arXiv 2305.07027
ARCHITECTURES = {
    "m0": ((64, 128, 192), (1, 2, 3), (4, 4, 4), (5, 5, 5, 5)),
    "m1": ((128, 144, 192), (1, 2, 3), (2, 3, 3), (7, 5, 3, 3)),
    "m2": ((128, 192, 224), (1, 2, 3), (4, 3, 2), (7, 5, 3, 3)),
    "m3": ((128, 240, 320), (1, 2, 3), (4, 3, 4), (5, 5, 5, 5)),
    "m4": ((128, 256, 384), (1, 2, 3), (4, 4, 4), (7, 5, 3, 3)),
    "m5": ((192, 288, 384), (1, 3, 4), (3, 3, 4), (7, 5, 3, 3)),
}


def encoder(size: str) -> nn.Sequential:
    dims, depths, heads, kernels = ARCHITECTURES[size]
    widths = [3, dims[0] // 8, dims[0] // 4, dims[0] // 2, dims[0]]
    patch: list[nn.Module] = []
    for i in range(4):
        patch += [conv_bn(widths[i], widths[i + 1], 3, 2), nn.ReLU()]
    stages = []
    for stage, resolution in enumerate((14, 7, 4)):
        sequence: list[nn.Module] = []
        if stage:
            sequence += [
                local_pair(dims[stage - 1]),
                Merge(dims[stage - 1], dims[stage]),
                local_pair(dims[stage]),
            ]
        sequence += [Block(dims[stage], heads[stage], resolution, kernels) for _ in range(depths[stage])]
        stages.append(nn.Sequential(*sequence))
    return nn.Sequential(nn.Sequential(*patch[:-1]), *stages)


class DecoderSe(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(dim, dim // 16, bias=False),
            nn.ReLU(),
            nn.Linear(dim // 16, dim, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x):
        return torch.einsum("nchw,nc->nchw", x, self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1)))


class Decoder(nn.Module):
    def __init__(self, latent_dim):
        super().__init__()
        self.fc = nn.Linear(latent_dim * 16, 50176)
        self.bn1d = nn.BatchNorm1d(50176)
        channels = (1024, 512, 512, 256, 64, 3)
        for i in range(1, 6):
            setattr(self, f"conv{i}", nn.ConvTranspose2d(channels[i - 1], channels[i], 4, 2, 1))
            if i < 5:
                setattr(self, f"bn{i}", nn.BatchNorm2d(channels[i]))
        for name, dim in (("res1", 512), ("res2", 64)):
            half = [nn.Conv2d(dim, dim, 3, 1, 1), nn.BatchNorm2d(dim)]
            other = [nn.Conv2d(dim, dim, 3, 1, 1), nn.BatchNorm2d(dim)]
            setattr(self, name, nn.Sequential(*half, nn.ReLU(), *other, nn.Sigmoid(), DecoderSe(dim), nn.ReLU()))

    def forward(self, latent):
        x = F.gelu(self.bn1d(self.fc(latent.reshape(len(latent), -1)))).view(-1, 1024, 7, 7)
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        x = self.res1(x) + x
        x = F.relu(self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x))))))
        x = self.res2(x) + x
        return self.conv5(x)


class ReferenceGSViT(nn.Module):
    """`evit` and `decoder` as in the released file; works on BGR [B, 3, 224, 224] in 0..1."""

    def __init__(self, size: str = "m5", decoder: bool = True):
        super().__init__()
        if decoder:
            with torch.device("meta"):  # not worth seconds of random numbers that `randomise` replaces
                self.decoder = Decoder(ARCHITECTURES[size][0][2])
            self.decoder.to_empty(device="cpu")
        self.evit = encoder(size)

    def decode(self, latent):
        return torch.sigmoid(self.decoder(latent))


@torch.no_grad()
def randomise(model: ReferenceGSViT, seed: int = 0) -> ReferenceGSViT:
    """Fill with weights, attention biases and batch-norm statistics that all matter; evaluation mode.

    The statistics are those of a few random images, then perturbed, so that activations keep a natural scale.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf == "attention_biases":
            parameter.normal_(0.0, 1.0, generator=generator)
        elif parameter.ndim > 1:
            bound = (3.0 / parameter[0].numel()) ** 0.5
            parameter.uniform_(-bound, bound, generator=generator)
        elif leaf == "weight":
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.uniform_(-0.3, 0.3, generator=generator)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    latent = model.train().evit(torch.rand(4, 3, 224, 224, generator=generator))
    if hasattr(model, "decoder"):
        model.decode(latent)
    for norm in norms:
        norm.running_mean += 0.2 * norm.running_var.sqrt() * torch.randn(norm.num_features, generator=generator)
        norm.running_var *= torch.empty(norm.num_features).uniform_(0.5, 2.0, generator=generator)
    return model.eval()
