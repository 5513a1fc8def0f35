"""Load the base model an adapter belongs to, or only its shapes."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import transformers
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pacatune import pretrained
from pacatune.adapters.folder import (
    AUTO_CLASSES,
    CONFIG_NAME,
    HEAD_KEY,
    SIDECAR_NAME,
    Adapter,
    LoraAdapter,
    find_tensors,
    read_sidecar,
)
from pacatune.files.json_file import parse_json_object
from pacatune.files.plain import check_files
from pacatune.files.tensor_file import read_layout
from pacatune.format.options import format_quantization
from pacatune.format.tensors import PEFT_PREFIX, plain_name
from pacatune.grid import is_packed
from pacatune.grid.loading import NotPackableError
from pacatune.ops.columns import put_columns_, read_columns
from pacatune.precision import Dtype, choose_device, torch_dtype
from pacatune.tuner.compat import get_quantization_kwargs, resolve_quantization_backend
from pacatune.tuner.quantized import Quantization, QuantizedLinear, dequantized

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

MergeBase = Literal["original", "dequantized", "nf4"]
"""What an adapter of a quantised base is merged onto. `dequantized` is the function that was
trained, written in 16 bits. `original` takes whatever was not trained from the checkpoint before
quantisation, which changes the outputs; `nf4` rounds every weight again."""


def quantization_config(quantization: Quantization, dtype: torch.dtype) -> "BitsAndBytesConfig":
    """Return what transformers needs to quantise a base as an adapter's base was."""
    kind = quantization.get("type")
    is_bitsandbytes = quantization.get("method") == "bitsandbytes"
    is_repeatable = kind == "int8" or quantization.get("block_size") == 64
    if is_bitsandbytes and kind in pretrained.QUANTIZATIONS and is_repeatable:
        return pretrained.bitsandbytes_config(kind, dtype, double=bool(quantization.get("double")))
    raise ValueError(
        f"the adapter's base was quantised as {format_quantization(quantization)!r}, which cannot "
        "be repeated while a model loads; load it with transformers, then the adapter with "
        "PeftModel.from_pretrained, and use those."
    )


@torch.no_grad()
def replace_quantised(model: PreTrainedModel, original: nn.Module | None) -> None:
    """Replace every quantised layer by a plain one, in place; adapters stay where they are.

    The weights are the quantised ones, dequantised. With the `original`, which is the same base
    before quantisation, they are its own, except the adapted columns: those were trained from the
    quantised ones.
    """
    options = get_quantization_kwargs(model)
    layers = {id(m.base_layer): m for m in model.modules() if isinstance(m, QuantizedLinear)}
    for name, module in list(model.named_modules()):
        backend = resolve_quantization_backend(module, **options)
        if backend is None:
            continue
        weight, layer = dequantized(backend, module, model.dtype), layers.get(id(module))
        if original is not None:
            columns, own = weight, original.get_submodule(plain_name(name))
            weight = cast(Tensor, own.weight).detach().to(columns).clone()
            for indices in [] if layer is None else layer.paca_indices.values():
                put_columns_(weight, indices, read_columns(columns, indices))
        model.set_submodule(name, _linear(weight, cast(Any, module).bias))
        if layer is not None:
            layer.quantization_backend = None
    cast(Any, model).hf_quantizer.remove_quantization_config(model)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    out_features, in_features = weight.shape
    plain = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().to(weight), requires_grad=False)
    return plain


DTypeName = Dtype | Literal["float64"]
"""`auto` is the dtype the base was saved in."""

CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS")
"""Tasks whose head has an output for each class."""
_PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)


def base_name(model: str | None, config: PeftConfig) -> str:
    """Return the base to load: the one given, else the one the adapter names."""
    name = model or config.base_model_name_or_path
    if not name:
        raise ValueError(
            "`model` is not given and the adapter does not name its base "
            "(`base_model_name_or_path` is empty); give the base's folder or hub id."
        )
    return str(Path(name).expanduser()) if name.startswith("~") else name


def load_base(
    name: str,
    *,
    task_type: str | None,
    dtype: DTypeName = "auto",
    device: str = "cpu",
    quantization: dict[str, Any] | None = None,
    num_labels: int | None = None,
    packed: bool | None = False,
) -> PreTrainedModel:
    """Load a base model for inference.

    `task_type` decides the head, `num_labels` its size; None takes the class that the base was
    saved from, and its own size. A base that is saved quantised stays so, whatever `quantization`
    says. `packed` keeps the matrices of a file or folder of few bits as they are there; where not
    all can, it says so, and None does not.
    """
    target = choose_device(device)
    config, model_class = _config_and_class(name, task_type, num_labels)
    wanted = dtype if dtype == "auto" else torch_dtype(dtype)
    # a head of another size is replaced by the adapter's
    options: dict[str, Any] = {"ignore_mismatched_sizes": num_labels is not None}
    if quantization is not None and getattr(config, "quantization_config", None) is None:
        compute_dtype: Any = config.dtype or torch.float32 if dtype == "auto" else wanted
        options |= {
            "quantization_config": quantization_config(quantization, compute_dtype),
            "device_map": {"": target},
        }
    model = None
    if packed and not is_packed(name):
        raise ValueError(
            f"`packed`: {name} is no GGUF file, and no folder of FP8 or INT4; leave it out."
        )
    if packed is not False and is_packed(name):
        try:
            model = pretrained.load_packed(model_class, name, dtype=wanted, config=config)
        except NotPackableError as error:
            if packed:
                warnings.warn(f"{error}; the model is loaded in 16 bits.", stacklevel=2)
    if model is None:
        model = pretrained.load_weights(model_class, name, dtype=wanted, config=config, **options)
    if "device_map" not in options:
        model = model.to(target)
    return cast(PreTrainedModel, model.eval())


def empty_base(
    name: str, *, task_type: str | None, num_labels: int | None = None
) -> PreTrainedModel:
    """Build a base model without weights, on the meta device: only its modules and shapes."""
    config, model_class = _config_and_class(name, task_type, num_labels)
    return cast(PreTrainedModel, pretrained.empty_model(model_class, config))


def num_labels_of(name: str, adapter: Adapter | LoraAdapter) -> int | None:
    """Return how many classes the head has that an adapter brings; None: as many as the base's.

    Classifiers and reward models are trained with a new head, which is saved with the adapter.
    """
    task_type = adapter.config.task_type
    if task_type not in CLASSIFIERS:
        return None
    base = empty_base(name, task_type=task_type)
    own, parameters = base.config.num_labels, dict(base.named_parameters())
    for key, entry in read_layout(find_tensors(adapter.folder)).tensors.items():
        parameter = parameters.get(key.removeprefix(PEFT_PREFIX))
        if parameter is None or parameter.shape[0] != own:
            continue
        if entry["shape"][0] != own and entry["shape"][1:] == list(parameter.shape[1:]):
            return int(entry["shape"][0])
    return None


def labels_of(adapter: Adapter | LoraAdapter, num_labels: int) -> dict[str, Any]:
    """Return what training says of a classifier's configuration: `id2label`, `pad_token_id`, ..."""
    path = adapter.folder / SIDECAR_NAME
    head = read_sidecar(adapter.folder).get(HEAD_KEY)
    if adapter.config.task_type not in CLASSIFIERS or head is None:
        return {}
    head = head if isinstance(head, dict) else {}
    names, padding = head.get("id2label"), head.get("pad_token_id")
    problem = head.get("problem_type")
    names = names if isinstance(names, dict) else {}
    is_list = {*names} == {str(number) for number in range(len(names))}
    if not (names and is_list and all(isinstance(name, str) for name in names.values())):
        raise ValueError(f"{path}: `id2label` must name the classes from '0' on; it is damaged.")
    if padding is not None and (type(padding) is not int or padding < 0):
        raise ValueError(
            f"{path}: `pad_token_id` ({str(padding)[:80]!r}) must be a token's number."
        )
    if problem not in (None, *_PROBLEMS):
        raise ValueError(
            f"{path}: `problem_type` ({problem!r:.80}) must be one of {', '.join(_PROBLEMS)}."
        )
    if len(names) != num_labels:
        raise ValueError(
            f"{path} names {len(names)} classes, and the adapter has a head of {num_labels}; they "
            "are of different runs, or one was edited."
        )
    id2label = {number: names[str(number)] for number in range(len(names))}
    label2id = {name: number for number, name in id2label.items()}
    labels = {"id2label": id2label, "label2id": label2id, "pad_token_id": padding}
    labels["problem_type"] = problem  # the base's may be another
    return {key: value for key, value in labels.items() if value is not None}


def load_tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer that lies beside a model, or None if there is none."""
    folder = Path(name)
    if folder.is_dir() and not any((folder / file).exists() for file in _TOKENIZER_FILES):
        return None
    if (folder / CONFIG_NAME).exists():
        _check_tokenizer(folder)
    try:
        return pretrained.load_tokenizer(name, option="model")
    except FileNotFoundError:
        raise
    except OSError as error:
        if not folder.is_dir():
            return None
        raise ValueError(
            f"the tokenizer of {name!r} cannot be read ({error}); repair its files, or remove them "
            "to go without."
        ) from error


def _check_tokenizer(folder: Path) -> None:
    """Refuse the tokenizer of an adapter that would have transformers open files elsewhere."""
    check_files(folder)
    if not (path := folder / "tokenizer_config.json").exists():
        return
    for key, value in parse_json_object(path.read_bytes(), source=str(path)).items():
        names_file = key.endswith("_file") and key != "special_tokens_map_file"  # which none opens
        if value and (names_file or key == "init_inputs"):
            raise ValueError(
                f"{path} gives `{key}` = {str(value)[:80]!r}, but the files of a tokenizer are "
                "found by their names; set it to null."
            )


def find_tokenizer(base: str, adapter_folder: Path | None) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer that training left with the adapter, else the base's.

    Training may have been given a chat template of its own, and saves it there.
    """
    own = None if adapter_folder is None else load_tokenizer(str(adapter_folder))
    return load_tokenizer(base) if own is None else own


def innermost(module: nn.Module) -> nn.Module:
    """Return the layer of the base model inside any PEFT layers."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def _config_and_class(name: str, task_type: str | None, num_labels: int | None) -> tuple[Any, Any]:
    config = pretrained.load_config(name, option="model")
    if num_labels is not None:
        config.num_labels = num_labels
    if task_type in AUTO_CLASSES:
        return config, getattr(transformers, AUTO_CLASSES[task_type])
    if not config.architectures:
        return config, transformers.AutoModel
    model_class = getattr(transformers, config.architectures[0], None)
    if isinstance(model_class, type) and issubclass(model_class, PreTrainedModel):
        return config, model_class
    raise ValueError(
        f"base model {name!r} is a {config.architectures[0]!r}, which transformers "
        f"{transformers.__version__} does not have; upgrade transformers. Models that bring their "
        "own code are not run."
    )
