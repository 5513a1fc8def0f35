"""Pretrained models, from a folder or the hub: find, describe, load and quantise them.

Code that comes with a model is never run, and weights are read from safetensors alone where a run
trains them. What cannot be read is an error that says whose it is and what to do.

In all of them `path` is a hub id or a folder, `revision` a branch, tag or commit of the hub's
model, and `option` where the path is from, for messages.
"""

import copy
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pacatune.files.journal import is_gguf, refuse_half_edited
from pacatune.grid import DEQUANTISED
from pacatune.installation import install_command, require_extra

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase

QUANTIZATIONS = ("nf4", "fp4", "int8")
"""Ways to hold weights in 4 or 8 bits, by bitsandbytes."""
_HUB_ID = re.compile(r"\w[\w\-.]*/[\w\-.]+")


def find_model(path: str, *, option: str = "model.path") -> str:
    """Return the absolute path of a local folder; a hub id as it is."""
    local = Path(path).expanduser()
    if is_gguf(local):
        require_extra(f"`{option}` ({path})", "gguf", ("gguf",))
        refuse_half_edited(local)
        if not local.is_file():
            raise FileNotFoundError(f"model file {path} does not exist; check `{option}`.")
        return str(local.resolve())
    if local.exists():
        if (local / "config.json").is_file():
            refuse_half_edited(local)
            return str(local.resolve())
        is_adapter = (local / "adapter_config.json").exists()
        hint = " (it is an adapter, not a base)" if is_adapter else ""
        raise FileNotFoundError(
            f"{path} holds no config.json{hint}; `{option}` must be a model folder."
        )
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise FileNotFoundError(f"model folder {path} does not exist; check `{option}`.")
    return path


def find_adapter(name: str | Path) -> Path | None:
    """Return the folder of an adapter that is here; None if the hub has one of this name."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"adapter {str(name)!r} is a file; give the folder that holds it.")
    if isinstance(name, Path) or not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"adapter folder {str(name)!r} does not exist; check `adapter`.")
    refuse_absent(name, option="adapter")
    return None


def refuse_no_weights(path: str) -> None:
    """Refuse a local folder without weights in safetensors, which alone are read to train."""
    folder = Path(path).expanduser()
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"`model.path` ({path}) holds no weights in safetensors (model.safetensors); copy "
            "them, or save the model anew by transformers."
        )


def refuse_absent(
    name: str, *, option: str, kind: str = "model", revision: str | None = None
) -> None:
    """Refuse what is no repository of the hub, or cannot be asked for, by one question.

    The hub's own clients ask for more than a minute where there is no network. What is in the cache
    is not asked for; what is not answered clearly is for the loading itself to say.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    cached = [Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}"]
    if kind == "dataset":
        cached.append(Path(constants.HF_HOME) / "datasets" / name.replace("/", "___"))
    if constants.HF_HUB_OFFLINE or any(folder.exists() for folder in cached):
        return
    try:
        HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=2)
    except GatedRepoError:
        return
    except (HFValidationError, RepositoryNotFoundError) as error:
        reason: Exception = error
    except HfHubHTTPError:
        return
    except Exception as error:  # of one of several HTTP libraries
        if "Connect" not in type(error).__name__ or "Timeout" in type(error).__name__:
            return
        reason = error
    else:
        return
    what = "data set" if kind == "dataset" else kind
    raise FileNotFoundError(
        f"`{option}` ({name!r}) is neither a file or folder here nor a {what} of the hub that can "
        f"be reached ({type(reason).__name__}); check the path or the network."
    ) from reason


def load_config(path: str, *, revision: str | None = None, option: str = "model.path") -> Any:
    """Load the configuration of a model, without a weight."""
    import torch
    import transformers

    if not Path(find_model(path, option=option)).exists():
        refuse_absent(path, option=option, revision=revision)
    try:
        with explained(path):
            config = transformers.AutoConfig.from_pretrained(
                **_source(path), revision=revision, trust_remote_code=False
            )
    except OSError as error:
        raise FileNotFoundError(
            f"`{option}` ({path!r}) is neither a file or folder here nor a model of the hub that "
            "can be reached; check the path or the network."
        ) from error
    except KeyError as error:
        raise ValueError(
            f"model {path!r} has a config.json without the key {error}; transformers "
            f"{transformers.__version__} cannot tell which architecture it is."
        ) from error
    if is_gguf(path):
        config.name_or_path = path
        config.dtype = torch.bfloat16  # which the values of few bits are held in
    return config


def _source(path: str) -> dict[str, str]:
    """Return how transformers is told where a model is: a GGUF is a file in a folder."""
    if not is_gguf(path):
        return {"pretrained_model_name_or_path": path}
    file = Path(path)
    return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}


def load_tokenizer(
    path: str, *, revision: str | None = None, option: str = "model.path"
) -> "PreTrainedTokenizerBase":
    """Load the tokenizer that lies beside a model; an OSError if there is none."""
    from transformers import AutoTokenizer

    if not Path(path).exists():
        refuse_absent(path, option=option, revision=revision)
    with explained(path):
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                **_source(path), revision=revision, trust_remote_code=False
            )
        except Exception as error:
            if isinstance(error, OSError) and not Path(path).exists():
                load_config(path, revision=revision, option=option)  # says if there is no model
            if isinstance(error, OSError) or "trust_remote_code" in str(error):
                raise
            # The Rust part of tokenizers raises plain Exception for a damaged file.
            raise ValueError(
                f"the tokenizer of {path} cannot be read ({type(error).__name__}: {error}); copy "
                "its files again."
            ) from error
    return tokenizer


def load_processor(path: str, *, revision: str | None = None) -> Any:
    """Load the processor of a model that takes images."""
    from transformers import AutoProcessor, ProcessorMixin

    with explained(path):
        processor = AutoProcessor.from_pretrained(path, revision=revision, trust_remote_code=False)
    if not isinstance(processor, ProcessorMixin) or not hasattr(processor, "image_processor"):
        raise ValueError(
            f"the data has images, and the model {path} takes texts alone; use a vision-language "
            "model, or take the images out."
        )
    return processor


def empty_model(model_class: Any, config: Any, **options: Any) -> Any:
    """Build a model on the meta device: modules and shapes, no weights."""
    import torch
    from transformers.modeling_utils import set_zero3_state

    build = getattr(model_class, "from_config", None)
    if build is None:
        build = model_class._from_config
    else:
        options["trust_remote_code"] = False
    path = str(getattr(config, "name_or_path", ""))
    # Under ZeRO-3 transformers would partition the weights among the processes, and fill them.
    with explained(path), torch.device("meta"), set_zero3_state():
        return build(config, **options)


def load_weights(
    model_class: Any,
    path: str,
    *,
    dtype: "torch.dtype | str",
    revision: str | None = None,
    **options: Any,
) -> Any:
    """Load a model with its weights, by any class of transformers; `auto` is their own type.

    `ignore_mismatched_sizes` is for heads: a body of other shapes, which would be random, is
    refused.
    """
    import transformers

    from pacatune.tuner.quantized import forbid_packing

    # Packed weights could not be trained: the codes of trained columns are written later.
    config = options.get("config") or load_config(path, revision=revision)
    if is_gguf(path) and hasattr(transformers, "GgufConfig"):  # older ones dequantise always
        options = {"quantization_config": transformers.GgufConfig(dequantize=True)} | options
    if is_short := is_dequantised(config):
        if config.quantization_config["quant_method"] != "fp8":
            require_extra(f"{path}", "compressed", ("compressed_tensors",))
        options["config"] = copy.deepcopy(config)
        options["config"].quantization_config["dequantize"] = True
    looks = bool(options.get("ignore_mismatched_sizes")) and "output_loading_info" not in options
    if looks:
        options = {**options, "output_loading_info": True}
    with explained(path), readable_weights(path):
        loaded = model_class.from_pretrained(
            **_source(path), revision=revision, dtype=dtype, trust_remote_code=False, **options
        )
        if looks:
            loaded, info = loaded
            names = [name for name, *_ in info["mismatched_keys"]]
            if any(name.startswith(f"{loaded.base_model_prefix}.") for name in names):
                raise ValueError(_OTHER_SHAPES.format(path))
    if is_short or is_gguf(path):
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.name_or_path = model.config.name_or_path = path
        model.is_quantized, model.hf_quantizer = False, None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    # An evaluation before training would spoil the base of LoRA.
    forbid_packing(loaded[0] if isinstance(loaded, tuple) else loaded)
    return loaded


def load_packed(model_class: Any, path: str, *, dtype: "torch.dtype | str", **options: Any) -> Any:
    """Load a model whose matrices stay in the blocks of a GGUF file, or the codes of a folder.

    `dtype` is that of all else, and what blocks are decoded to for a product. See `fill_packed`.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import GenerationConfig

    from pacatune.grid.loading import fill_packed

    config = copy.deepcopy(options.pop("config", None) or load_config(path))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    own = dtype if isinstance(dtype, torch.dtype) else config.dtype or torch.float32
    with explained(path), init_empty_weights(include_buffers=False):
        model = model_class.from_config(config, dtype=own, trust_remote_code=False, **options)
    fill_packed(model, path, own)
    model.name_or_path = model.config.name_or_path = path
    if (Path(path) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval()


def is_dequantised(config: Any) -> bool:
    """Whether a model in safetensors is of few bits that are dequantised as it is loaded."""
    section = getattr(config, "quantization_config", None) or {}
    return isinstance(section, dict) and section.get("quant_method") in DEQUANTISED


_OTHER_SHAPES = (
    "the weights of {} have other shapes than its configuration says; copy the model again."
)


@contextmanager
def readable_weights(owner: str) -> Iterator[None]:
    """Raise a ValueError that names the owner of weights that cannot be read in this block."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"the weights of {owner} cannot be read ({error}); copy them again."
        ) from error
    except RuntimeError as error:  # of transformers, after a table of what it means
        # In the words of transformers 5, and of torch, which older ones let through.
        words = "mismatched", "conversion of the weights", "size mismatch"
        if not any(word in str(error) for word in words):
            raise
        raise ValueError(_OTHER_SHAPES.format(owner)) from error


@contextmanager
def explained(path: str) -> Iterator[None]:
    """Say in our words that a model needs code of its own, or that its GGUF file is damaged."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and "trust_remote_code" in str(error):
            raise ValueError(
                f"model {path} comes with code of its own, which is never executed; use a version "
                "of it that transformers supports."
            ) from error
        if not is_gguf(path) or isinstance(error, ImportError):
            raise
        raise ValueError(
            f"{path} cannot be read as a GGUF file ({type(error).__name__}: {error}); copy it "
            "again, or take one of an architecture that transformers reads."
        ) from error


def check_quantizable(kind: str, config: Any, path: str, *, option: str) -> None:
    """Refuse to quantise a model that is quantised, or where bitsandbytes is missing."""
    if getattr(config, "quantization_config", None) is not None or is_gguf(path):
        raise ValueError(
            f"`{option}` ({kind!r}): {path} is saved quantised already; drop the option, or give "
            "the original model."
        )
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"`{option}` ({kind!r}) needs bitsandbytes; {install_command('quant')}.")


def bitsandbytes_config(
    kind: str, dtype: "torch.dtype", *, double: bool = True, storage: "torch.dtype | None" = None
) -> "BitsAndBytesConfig":
    """Return what transformers needs to hold weights in few bits.

    With 4 bits, `dtype` is that of the products, `double` quantises the scales too, and `storage`
    is the type that packed weights seem to have, bitsandbytes' own where None.
    """
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_worth_saying)
        return BitsAndBytesConfig(load_in_8bit=True)
    options = {} if storage is None else {"bnb_4bit_quant_storage": storage}
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
        **options,
    )


def _is_worth_saying(record: logging.LogRecord) -> bool:
    """Whether a log line is not the one that every 8-bit layer writes in every forward pass."""
    return "inputs will be cast" not in record.msg
