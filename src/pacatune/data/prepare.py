"""From rows to tokens: read, encode, split, check, before any model weight is loaded."""

import hashlib
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import chain, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pacatune.data.checks import keep_learnable
from pacatune.data.config import DataConfig, DataSection, SourceConfig
from pacatune.data.encode import IGNORED, Encoder, ImagesFound
from pacatune.data.formats import to_examples
from pacatune.data.read import Row, files_of, is_local, load_hub, read_rows

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

Encode = Callable[[Any], dict[str, Any]]
"""Makes columns of an example, among them `notes` of what looks wrong."""


@dataclass(frozen=True)
class PreparedData:
    """Data as a trainer takes it, and what was found in it.

    In supervised fine-tuning: columns input_ids, labels (-100 where nothing is learned) and place.
    """

    train: "Dataset"
    evaluation: "Dataset | None"
    longest: int
    """Tokens of the longest training example, after cutting."""
    warnings: list[str]
    """What is probably not meant, one sentence each."""
    processor: Any = None
    """What makes images into tensors, where chats have some: rows then have text and images too."""


def prepare_data(
    config: DataConfig,
    encoder: Encoder,
    num_processes: int | None = None,
    load_processor: Callable[[], Any] | None = None,
) -> PreparedData:
    """Read, encode, split and check the data of a run.

    `load_processor` is asked for the model's processor where chats have images.
    """
    convert = partial(to_examples, has_template=bool(encoder.tokenizer.chat_template))
    try:
        parts, data = make_tables(config, encoder, convert, encoder.max_length, num_processes)
    except ImagesFound:
        if load_processor is None or encoder.learn_all:
            raise
        encoder = replace(encoder, processor=load_processor())
        parts, data = make_tables(config, encoder, convert, encoder.max_length, num_processes)
    return replace(data, train=_mixed(parts, config), processor=encoder.processor)


@dataclass
class Examples:
    """The examples of a data set: read anew whenever they are asked for, and never held."""

    source: SourceConfig
    option: str
    """Where its path is from, for messages."""
    convert: Callable[[Iterable[Row], str], Iterator[Any]]
    """Makes examples of rows, given their format."""

    def __iter__(self) -> Iterator[Any]:
        source = self.source
        rows = read_rows(source.path, name=source.name, split=source.split, option=self.option)
        return self.convert(rows, source.format)

    def digest(self, *, with_images: bool) -> str:
        """Return what tells the data from other data."""
        source, digest = self.source, hashlib.blake2b(digest_size=16)
        if is_local(source.path, self.option, source.split, source.name):
            for file in files_of(source.path):
                with file.open("rb") as content:
                    digest.update(hashlib.file_digest(content, "blake2b").digest())
                digest.update(str(file).encode())
        else:
            table = load_hub(source.path, source.name, source.split, self.option)
            digest.update(f"{source.path} {source.split} {table._fingerprint}".encode())
        for image in (image for example in self for image in example.images) if with_images else ():
            if not image.startswith("data:"):
                digest.update(str(Path(image).stat().st_mtime_ns).encode())
        return digest.hexdigest()

    def encoded(self, encode: Encode, num_processes: int | None) -> "Dataset":
        """Return what `encode` makes of each, from the cache of datasets, which has a lock.

        So of several processes one reads the rows, and the others what it has made of them.
        """
        from datasets import Dataset
        from datasets.exceptions import DatasetGenerationError
        from datasets.fingerprint import Hasher

        digest = self.digest(with_images=getattr(encode, "processor", None) is not None)
        code = [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]
        work = [self.source.format, self.convert, encode, code]
        key = Hasher.hash([digest, work, version("transformers"), version("tokenizers")])
        number = sum(1 for _ in self) if (num_processes or 1) > 1 else sys.maxsize
        size = -(-number // (num_processes or 1))
        starts = list(range(0, number, size))
        arguments = {"starts": starts, "size": size, "examples": self, "encode": encode}
        try:
            return Dataset.from_generator(
                _encode,
                features=_features(encode(next(iter(self)))),
                gen_kwargs=arguments,
                num_proc=len(starts) if len(starts) > 1 else None,
                fingerprint=key,
            )
        except DatasetGenerationError as error:
            if len(starts) > 1:
                all(map(encode, self))  # which raises what another process was refused for
            raise error.__cause__ or error from None


def _encode(
    starts: list[int], size: int, examples: Examples, encode: Encode
) -> Iterator[dict[str, Any]]:
    """Yield the rows of some parts; datasets gives each process its own."""
    for start in starts:
        yield from map(encode, islice(examples, start, start + size))


def _features(columns: Iterable[str]) -> "Features":
    from datasets import Features, Image, List, Value

    kinds = {"place": Value("string"), "text": Value("string"), "num_tokens": Value("int64")}
    kinds |= {"row": Value("string"), "label": Value("bool"), "notes": List(Value("string"))}
    kinds |= {"images": List(Image(decode=False))}
    return Features({name: kinds.get(name, List(Value("int32"))) for name in columns})


def find_examples(
    config: DataSection, convert: Callable[[Iterable[Row], str], Iterator[Any]]
) -> tuple[list[Examples], Examples | None]:
    """Return the data sets of training, and that of evaluation if it is not a part of them."""
    sources = [Examples(*source, convert) for source in config.sources()]
    held_out = config.evaluation_source()
    return sources, None if held_out is None else Examples(*held_out, convert)


def make_tables(
    config: DataSection,
    encode: Encode,
    convert: Callable[[Iterable[Row], str], Iterator[Any]],
    limit: int | None = None,
    num_processes: int | None = None,
) -> "tuple[list[Dataset], PreparedData]":
    """Read, encode, split and check data sets; return each for training, and all in one.

    `limit` is the number of tokens that examples are cut to.
    """
    sources, held_out = find_examples(config, convert)
    warnings: list[str] = []
    parts, evaluation = [], []
    for examples in sources:
        data = examples.encoded(encode, num_processes)
        fraction = 0 if held_out else config.eval_fraction
        rest, others = map(sorted, hold_out(data["place"][:], fraction, config.seed))
        what = f"{examples.source.path} training" if len(sources) > 1 else "training"
        parts.append(keep_learnable(data.select(rest), what, limit, warnings))
        evaluation += [data.select(others)] if others else []
    other = held_out.encoded(encode, num_processes) if held_out else _joined(evaluation)
    if other is not None:
        other = keep_learnable(other, "evaluation", limit, warnings)
    longest = max(max(part["num_tokens"][:]) for part in parts)
    return parts, PreparedData(_joined(parts), other, min(longest, limit or longest), warnings)


def hold_out(keys: Iterable[Any], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Hold out a fraction of the keys; return the places of both parts' rows, as drawn."""
    import torch

    places = defaultdict(list)
    for place, key in enumerate(keys):
        places[key].append(place)
    rows, number = list(places.values()), max(1, round(len(places) * fraction)) if fraction else 0
    if number >= len(rows):
        rule = f"`data.eval_fraction` ({fraction}) of {len(rows)} rows leaves none to train on"
        raise ValueError(f"{rule}; give more data or `data.eval_path`, or set it to 0.")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows), generator=generator, device="cpu")
    drawn = [rows[place] for place in order.tolist()]
    return list(chain(*drawn[number:])), list(chain(*drawn[:number]))


def _mixed(parts: list[Any], config: DataConfig) -> Any:
    """Put data sets together whole, or draw from them by their weights."""
    from datasets import interleave_datasets

    weights = [source.weight for source, _ in config.sources() if source.weight is not None]
    if len(parts) == 1 or not weights:
        return _joined(parts)
    total = sum(weights)
    return interleave_datasets(
        parts,
        probabilities=[weight / total for weight in weights],
        seed=config.seed,
        stopping_strategy=config.mix_strategy,
    )


def _joined(parts: list[Any]) -> Any:
    from datasets import concatenate_datasets

    return concatenate_datasets(parts) if len(parts) > 1 else next(iter(parts), None)


def show_preview(
    data: "Dataset", tokenizer: "PreTrainedTokenizerBase", num_examples: int, console: "Console"
) -> None:
    """Print the first examples; learned tokens are green, or without colour between [[ and ]]."""
    from rich.text import Text

    has_colour = console.color_system is not None
    for row in data.select(range(min(num_examples, len(data)))):
        num_learned = sum(label != IGNORED for label in row["labels"])
        num_tokens, num_kept = row["num_tokens"], len(row["input_ids"])
        cut = f" (cut from {num_tokens})" if num_kept < num_tokens else ""
        title = f"{row['place']}: {num_kept} tokens{cut}, {num_learned} learned"
        console.rule()
        console.print(title, markup=False, highlight=False, soft_wrap=True)
        text, pairs = Text(), zip(row["input_ids"], row["labels"], strict=True)
        for learned, run in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
            ids = [token for token, _ in run]
            piece = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            shown = f"[[{piece}]]" if learned and not has_colour else piece
            text.append(shown, style="bold green" if learned else "dim")
        console.print(text)
    console.rule()
    mark = "green" if has_colour else "between [[ and ]]"
    console.print(f"Learned tokens are {mark}; the others are context.", highlight=False)
