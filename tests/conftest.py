"""Tiny models and tokenizers, built once per session: no test needs a network."""

import copy
import gc
import itertools
import os
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from tests import forks


def pytest_configure(config):
    if "HF_DATASETS_CACHE" not in os.environ:  # xdist's workers have it
        folder = tempfile.TemporaryDirectory(prefix="pacatune-datasets-")
        os.environ["HF_DATASETS_CACHE"] = folder.name
        config.add_cleanup(folder.cleanup)
    forks.spare_the_disk()
    gc.unfreeze = _unfreeze  # as benchmarks call it
    # PEFT 0.21 asks transformers >= 5.24 by the old name, in every get_peft_model.
    config.addinivalue_line(
        "filterwarnings", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
    )


def pytest_collection_modifyitems(items):
    for item in items:
        if item.nodeid.startswith(forks.SEVERAL_PROCESSES):
            item.add_marker("processes")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give files to workers as `--dist loadfile` does, but those of several processes to one."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            if nodeid.startswith(forks.SEVERAL_PROCESSES):
                return "several processes"
            return super()._split_scope(nodeid)

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item):
    """Send what is to be told of a test to the terminal, from xdist's workers too."""
    item.user_properties += [("repeated", command) for command in forks.repeated]
    forks.repeated.clear()


def pytest_terminal_summary(terminalreporter):
    """Say which launches were repeated: a crash that is seen more often is no accident."""
    for report in itertools.chain(*terminalreporter.stats.values()):
        if getattr(report, "when", "") == "teardown":  # the last one of a test
            told = [command for name, command in report.user_properties if name == "repeated"]
            for command in told:
                terminalreporter.write_line(f"REPEATED after a crash: {report.nodeid}: {command}")


class _Frozen:
    """How many modules there were when all objects were last frozen; 0 once somebody thaws them."""

    num_modules = 0
    thaw = staticmethod(gc.unfreeze)


def _unfreeze():
    _Frozen.thaw()
    _Frozen.num_modules = 0


@pytest.fixture(autouse=True)
def _forget_old_objects():
    """Keep what imports have made out of garbage collections: each would walk millions of objects.

    Every run of a trainer ends with one, which took a second.
    """
    if len(sys.modules) > _Frozen.num_modules:
        gc.collect(2 if _Frozen.num_modules else 1)
        gc.freeze()
        _Frozen.num_modules = len(sys.modules) + 10  # a few more do not matter


@pytest.fixture(autouse=True)
def _compute_on_one_thread():
    """Undo what a measurement sets: others compute beside this process."""
    yield
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
        torch.set_float32_matmul_precision("highest")


CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

CORPUS = [
    "What is the capital of France? The capital of France is Paris.",
    "Please write a short answer to the question, and say where it is from.",
]


def build_tokenizer():
    """Byte-level BPE of about 300 tokens that, like Llama's, puts <s> before plain text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **special
    )


def build_model(vocab_size, seed=0, **config):
    """Random two-layer Llama, 32 wide, in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {"vocab_size": vocab_size, "max_position_embeddings": 256}
    settings |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    settings |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**settings, **config})).eval()


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return build_tokenizer()


@pytest.fixture
def tokenizer(tiny_tokenizer):
    """A tokenizer that a test may change."""
    return copy.deepcopy(tiny_tokenizer)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory, tiny_tokenizer):
    """Folder of a tiny Llama with its tokenizer and chat template, as from a model hub."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    build_model(len(tiny_tokenizer)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def rewards_module(tmp_path, monkeypatch):
    """The module `my_rewards` in the current folder, as a user writes one."""
    name = "my_rewards"
    (tmp_path / f"{name}.py").write_text(
        "def short(completions, **kwargs):\n"
        "    return [-len(text) / 10 for text in completions]\n\n\n"
        "def even(completions, number, **kwargs):\n"
        "    return [float(n % 2 == 0) for n in number]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield name
    sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def with_moslora():
    """The methods with the paper's baseline that experiments add, and without it afterwards."""
    from experiments.moslora import add_method
    from pacatune.methods import METHODS

    add_method()
    yield
    del METHODS["moslora"]


@pytest.fixture
def console():
    """What a run prints, in `console.file`."""
    import io

    from rich.console import Console

    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def drawn():
    """Pictures are drawn, in a folder whose tests have `blank_pictures` otherwise."""


@pytest.fixture
def blank_pictures(request, monkeypatch):
    """Pictures of one pixel: to draw them took a third of the time of a run."""
    if "drawn" in request.fixturenames:
        return
    from matplotlib.figure import Figure
    from PIL import Image

    monkeypatch.setattr(
        Figure, "savefig", lambda self, path, **options: Image.new("L", (1, 1)).save(path)
    )


@pytest.fixture
def own_strategies(monkeypatch):
    """What a test registers as a strategy is gone after it."""
    import pacatune.selection  # noqa: F401  (`pacatune.strategies` itself is a function)

    module = sys.modules["pacatune.strategies"]
    monkeypatch.setattr(module, "_STRATEGIES", dict(module._STRATEGIES))
