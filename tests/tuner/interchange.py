"""Models and adapters for both sides of test_interchange, without importing pacatune."""

import sys

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class Scaled(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x):
        return 3 * super().forward(x)


class Net(nn.Module):
    """A layer of each kind."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.mixed = nn.MultiheadAttention(8, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.conv1d = Conv1D(8, 8)
        self.conv = nn.Conv1d(8, 8, 1)
        self.scaled = Scaled(8, 8)
        self.head = nn.Linear(8, 8)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.mixed(x, x, x, need_weights=False)[0]
        x = self.encoder(x)
        for layer in self.layers:
            x = x + layer(x).tanh()
        x = x + self.conv1d(x) + self.conv(x.mT).mT + self.scaled(x)
        return self.head(x)


def build():
    torch.manual_seed(0)
    return Net().eval()


def outputs(model):
    with torch.no_grad():
        return model.eval()(torch.arange(22).reshape(2, 11) % 11)


def randomise(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "paca_delta" in name:
                parameter.normal_(std=0.3, generator=generator)


PEFT_WRITES = {
    "default": {},
    "negative seed": {"random_seed": -3},
    "large seed, alpha 0": {"random_seed": 2**63 + 5, "paca_alpha": 0},
    "negative alpha": {"paca_alpha": -6, "r": 2},
    "regex and layers": {"target_modules": r"layers\.\d+", "layers_to_transform": [1]},
    "excluded": {"exclude_modules": ["layers.1"]},
    "head, all columns": {"modules_to_save": ["head"], "r": 8, "init_weights": False},
}


def write(folder):
    """Write adapters as PEFT's own PaCA does, and what the model with each computes."""
    from peft import PacaConfig, get_peft_model

    for name, options in PEFT_WRITES.items():
        options = {"r": 3, "target_modules": ["layers.0", "layers.1"], **options}
        model = get_peft_model(build(), PacaConfig(**options))
        randomise(model)
        model.save_pretrained(f"{folder}/{name}")
        torch.save(outputs(model), f"{folder}/{name}/outputs.pt")


def read(folder):
    """Print what PEFT's own PaCA makes of an adapter: right, wrong, or the error's last line."""
    from peft import PeftModel

    assert "pacatune" not in sys.modules
    try:
        model = PeftModel.from_pretrained(build(), folder)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
    else:
        expected = torch.load(f"{folder}/outputs.pt")
        print("right" if torch.allclose(outputs(model), expected, atol=1e-6) else "wrong")
