"""Tests with a real vLLM on the CPU, in an environment of their own: `make test-vllm`."""

import contextlib
import hashlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from functools import partial

import pytest
import torch

from tests.sync.ranks import held_by, trained_state

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]  # `make test` has no vLLM

# Before vLLM is imported anywhere.
os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")

SMALL = {"enforce_eager": True, "max_model_len": 256, "max_num_batched_tokens": 256}
OURS = {"weight_transfer_config": {"backend": "pacatune"}}
PROMPTS = ["The capital of France is", "Two and two make", "Once upon a time"]


@pytest.fixture(scope="session")
def model_path():
    from examples.packaged import prepare

    return str(prepare("smollm2"))


def start(path, **options):
    from vllm import LLM

    return LLM(path, dtype="bfloat16", max_num_seqs=8, **SMALL, **OURS, **options)


def stop(llm):
    llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="session")
def llm(model_path):
    engine = start(model_path)
    yield engine
    stop(engine)


def answers(llm):
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=24)
    return [one.outputs[0].text for one in llm.generate(PROMPTS, greedy, use_tqdm=False)]


def by_name(checksums):
    return {name.rpartition(":")[2]: digest for name, digest in checksums.items()}


def digests_by_rank(llm):
    """SHA-256 of each of vLLM's own tensors, computed in its workers."""
    return [by_name(found) for found in llm.collective_rpc("compute_weight_checksums")]


def served_digests(llm):
    (found,) = digests_by_rank(llm)
    return found


def digest(tensor):
    data = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data).hexdigest()


def trained_digests(model, rank=0, size=1):
    """What a rank should serve: its part of W', joined as vLLM joins it."""
    held = held_by(trained_state(model), rank, size)
    return {name: digest(tensor) for name, tensor in held.items() if "lm_head" not in name}


def adapted(path, **options):
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from pacatune import PacaConfig

    base = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    return get_peft_model(base, PacaConfig(r=16, paca_alpha=16, **options))


def save_small_model(tokenizer_path, folder, kind="Llama", **more):
    """Two layers at random, whose heads two ranks can share; SmolLM2 has nine."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 49152, "hidden_size": 128, "intermediate_size": 256}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = getattr(transformers, f"{kind}Config")(tie_word_embeddings=True, **sizes, **more)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).bfloat16()
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tokenizer_path).save_pretrained(folder)


class Trainer:
    """Plain training steps on random tokens, far enough that answers change."""

    def __init__(self, model):
        self.model = model
        trained = [one for one in model.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=5e-3)
        self.generator = torch.Generator().manual_seed(0)

    def step(self):
        ids = torch.randint(0, 40_000, (1, 16), generator=self.generator)
        self.model.train()
        self.model(input_ids=ids, labels=ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


@contextlib.contextmanager
def serve(path, port, log):
    """A vLLM server with our engine, as a process of its own."""
    words = [*(f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items() if v is not True)]
    command = [
        # What `vllm serve` runs; that command asks for a package named vllm, and has vllm-cpu.
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", path),
        *("--enforce-eager", "--dtype", "bfloat16", "--max-num-seqs", "8", *words),
        *("--weight-transfer-config", json.dumps(OURS["weight_transfer_config"])),
        *("--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"),
        *("--host", "127.0.0.1", "--port", str(port)),
    ]
    settings = {"VLLM_SERVER_DEV_MODE": "1"}
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=os.environ | settings, start_new_session=True
        )
        try:
            wait_for(f"http://127.0.0.1:{port}", process, log)
            yield process
        finally:
            process.terminate()
            process.wait(60)


def wait_for(address, process, log, seconds=300):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5)
        except OSError:
            time.sleep(1)
        else:
            return
    pytest.fail(log.read_text()[-4000:])


def weights_of(address):
    data = json.dumps({"action": "checksum"}).encode()
    request = urllib.request.Request(
        f"{address}/weight_checker", data=data, headers={"Content-Type": "application/json"}
    )
    return by_name(json.loads(urllib.request.urlopen(request, timeout=120).read())["checksums"])


def grpo_words(folder, model, reward, **training):
    """Words of a `pacatune train` on prompts.jsonl, whose answers come from vLLM."""
    training = {
        "output_dir": folder / "run",
        "use_vllm": "true",
        "num_generations": 4,
        "max_completion_length": 12,
        "learning_rate": 1e-3,
        "use_cpu": "true",
        **training,
    }
    words = [word for k, v in training.items() for word in (f"--training.{k}", str(v))]
    words += ["--model.path", str(model), "--data.path", str(folder / "prompts.jsonl")]
    return ["train", *words, "--task", "grpo", "--reward", reward]


@pytest.fixture
def eager(monkeypatch):
    """TRL would compile the model, which takes minutes on a CPU."""
    from trl.generation import vllm_generation

    llm = partial(vllm_generation.LLM, enforce_eager=True)
    monkeypatch.setattr(vllm_generation, "LLM", llm)


def find_free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture
def free_port():
    return find_free_port()
