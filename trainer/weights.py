"""Weights between Hugging Face directories and sharded models: each rank touches its own rows.

FSDP2 gives each rank a range of rows of every parameter, and `families.sources` says which rows of
which of their tensors those are. A safetensors file stores a tensor's rows one behind the other, so
each rank reads, or writes, its ranges at their places in the file: no rank ever holds more of the
model than its shard and a small buffer, nothing is sent, and all ranks work at once. (The library
maps whole files into memory and saves whole files from one process; hence the plain reads here.)

A file is 8 bytes of header length, a JSON header {tensor: {dtype, shape, data_offsets}}, the data.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..kernels.attention import Backend
from .families import decoder_config, sources
from .model import Decoder, draw_weights

MAX_FILE_BYTES = 5 * 10**9
BUFFER_BYTES = 32 * 2**20
INDEX_NAME = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """Where a tensor lies."""

    file: Path
    offset: int
    """Of its first byte in the file."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_numel(self) -> int:
        return math.prod(self.shape[1:])


def local_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """This rank's rows of a parameter, and the number of the first of them."""
    if not isinstance(parameter, DTensor):
        return parameter.detach(), 0
    _, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return parameter.to_local().detach(), offset[0]


def initialize(model: Decoder, seed: int) -> None:
    """Fill every shard with its part of the same random model, whatever the number of ranks."""
    for name, parameter in model.named_parameters():
        rows, first = local_rows(parameter)
        whole = draw_weights(name, parameter.shape, model.config, seed)
        rows.copy_(whole[first : first + len(rows)])


def random_model(
    raw_config: dict[str, Any], backend: Backend, *, seed: int, device: torch.device
) -> Decoder:
    """A whole model of the shape that a `config.json` describes, for benchmarks and tests.

    `random_model(families.base_config("Qwen3-4B-Base"), ...)` needs no download.
    """
    with torch.device("meta"):
        model = Decoder(decoder_config(raw_config), backend)
    model.to_empty(device=device)
    initialize(model, seed)
    return model


def load(model: Decoder, folder: Path) -> None:
    """Fill every shard from a Hugging Face directory.

    Raises:
        ValueError: a file is absent, cut short or corrupt, or a tensor is missing, unexpected or
            of the wrong shape; each is named. Nothing is read before all of that is checked.
    """
    stored = stored_tensors(folder)
    check_tensors(stored, model, folder)
    buffer = torch.empty(BUFFER_BYTES, dtype=torch.uint8)
    files: dict[Path, int] = {}
    try:
        for rows, place, first_row in _pieces(model, stored):
            handle = files.setdefault(place.file, -1)
            if handle < 0:
                handle = files[place.file] = os.open(place.file, os.O_RDONLY)
            _read_rows(handle, place, first_row, rows, buffer)
    finally:
        for handle in files.values():
            os.close(handle)


def export(
    model: Decoder,
    folder: Path,
    *,
    raw_config: dict[str, Any],
    tokenizer_path: Path,
    dtype: torch.dtype,
) -> None:
    """Write a folder that transformers and vLLM load as it is. A collective.

    The first rank lays out the files; then every rank writes its own rows into them, rounded once
    from the masters to `dtype`.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    layout = plan_files(model, folder, dtype)
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
        _write_headers(layout)
        _write_config(raw_config, folder, tokenizer_path, dtype)
    dist.barrier()  # the files must exist before ranks write into them
    files: dict[Path, int] = {}
    try:
        for rows, place, first_row in _pieces(model, layout):
            if place.file not in files:
                files[place.file] = os.open(place.file, os.O_WRONLY)
            _write_rows(files[place.file], place, first_row, rows)
        for handle in files.values():
            os.fsync(handle)
    finally:
        for handle in files.values():
            os.close(handle)
    dist.barrier()  # no rank takes for whole what another still writes


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Where each tensor of a Hugging Face directory lies, from the file headers alone.

    Raises:
        ValueError: no weights, an index that names an absent file, or a file that is cut short.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise ValueError(
                f"{index} names {', '.join(absent)}, absent from {folder}: copy it anew"
            )
    else:
        names = sorted(file.name for file in folder.glob("*.safetensors"))
    if not names:
        raise ValueError(f"{folder} holds no weights (*.safetensors)")
    tensors: dict[str, Stored] = {}
    for name in names:
        tensors |= _read_header(folder / name)
    return tensors


def check_tensors(stored: dict[str, Stored], model: Decoder, folder: Path) -> None:
    """Compare what a directory holds with what the model needs.

    Raises:
        ValueError: naming the tensors that are missing, unexpected or misshapen.
    """
    wanted = expected_shapes(model)
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - stored.keys())]
    for name in sorted(stored.keys() - wanted.keys()):
        if name.endswith("rotary_emb.inv_freq"):
            continue  # old checkpoints carry this buffer; it follows from the config
        if name == "lm_head.weight" and model.head is None:
            embedding = stored.get("model.embed_tokens.weight")
            if embedding is None or not _same_bytes(stored[name], embedding):
                problems.append(
                    f"{name} differs from the embedding, but tie_word_embeddings is set"
                )
        else:
            problems.append(f"{name} {list(stored[name].shape)} is not part of this architecture")
    for name in sorted(wanted.keys() & stored.keys()):
        if stored[name].shape != wanted[name]:
            problems.append(
                f"{name} has shape {list(stored[name].shape)}, expected {list(wanted[name])}"
            )
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{folder} does not fit its config.json: {'; '.join(problems[:5])}{more}")


def _same_bytes(first: Stored, second: Stored) -> bool:
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    left = math.prod(first.shape) * first.dtype.itemsize
    with first.file.open("rb") as one, second.file.open("rb") as other:
        one.seek(first.offset)
        other.seek(second.offset)
        while left:
            num_bytes = min(left, BUFFER_BYTES)
            if one.read(num_bytes) != other.read(num_bytes):
                return False
            left -= num_bytes
    return True


def expected_shapes(model: Decoder) -> dict[str, tuple[int, ...]]:
    """The shape of each of their tensors, in the order of our parameters."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        for source in sources(name, model.config):
            num_rows = max(source.first_row + source.num_rows, *shapes.get(source.tensor, (0,))[:1])
            shapes[source.tensor] = (num_rows, *parameter.shape[1:])
    return shapes


def plan_files(model: Decoder, folder: Path, dtype: torch.dtype) -> dict[str, Stored]:
    """Where each tensor of an export will lie: files of at most `MAX_FILE_BYTES`."""
    files: list[dict[str, tuple[int, ...]]] = [{}]
    held_bytes = 0
    for name, shape in expected_shapes(model).items():
        num_bytes = math.prod(shape) * dtype.itemsize
        if files[-1] and held_bytes + num_bytes > MAX_FILE_BYTES:
            files.append({})
            held_bytes = 0
        files[-1][name] = shape
        held_bytes += num_bytes
    layout: dict[str, Stored] = {}
    for number, shapes in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        path = folder / (name if len(files) > 1 else "model.safetensors")
        offset = 8 + len(_header(shapes, dtype))
        for tensor, shape in shapes.items():
            layout[tensor] = Stored(file=path, offset=offset, shape=shape, dtype=dtype)
            offset += math.prod(shape) * dtype.itemsize
    return layout


def _pieces(model: Decoder, places: dict[str, Stored]) -> Iterator[tuple[Tensor, Stored, int]]:
    """(rows of this rank, the tensor they belong to, their first row in it), in file order."""
    for name, parameter in model.named_parameters():
        local, first = local_rows(parameter)
        start = 0  # of the source, in rows of our parameter
        for source in sources(name, model.config):
            low = max(first, start)
            high = min(first + len(local), start + source.num_rows)
            if low < high:
                rows = local[low - first : high - first]
                yield rows, places[source.tensor], source.first_row + low - start
            start += source.num_rows


def _read_rows(handle: int, place: Stored, first_row: int, rows: Tensor, buffer: Tensor) -> None:
    flat = rows.view(-1)
    size = place.dtype.itemsize
    offset = place.offset + first_row * place.row_numel * size
    step = BUFFER_BYTES // size
    for start in range(0, len(flat), step):
        part = flat[start : start + step]
        raw = buffer[: len(part) * size]
        view = raw.numpy().data
        while view:  # one read returns at most 2 GiB, and may return less
            num_bytes = os.preadv(handle, [view], offset)
            if num_bytes == 0:
                raise ValueError(f"{place.file} ends at byte {offset}: it was cut short")
            view, offset = view[num_bytes:], offset + num_bytes
        part.copy_(raw.view(place.dtype))


def _write_rows(handle: int, place: Stored, first_row: int, rows: Tensor) -> None:
    flat = rows.reshape(-1)
    size = place.dtype.itemsize
    offset = place.offset + first_row * place.row_numel * size
    step = BUFFER_BYTES // size
    for start in range(0, len(flat), step):
        part = flat[start : start + step].to("cpu", place.dtype).contiguous()
        view = part.view(torch.uint8).numpy().data
        while view:
            num_bytes = os.pwrite(handle, view, offset)
            view, offset = view[num_bytes:], offset + num_bytes


def _read_header(file: Path) -> dict[str, Stored]:
    num_bytes = file.stat().st_size
    with file.open("rb") as handle:
        header_bytes = int.from_bytes(handle.read(8), "little")
        if not 0 < header_bytes <= num_bytes - 8:
            raise ValueError(f"{file} is not a safetensors file, or was cut short: copy it anew")
        try:
            header = json.loads(handle.read(header_bytes))
        except ValueError as error:
            raise ValueError(f"{file} has a corrupt header ({error}): copy it anew") from error
    start = 8 + header_bytes
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise ValueError(
                f"{file}: {name} has dtype {entry['dtype']}; trained are only {', '.join(DTYPES)}"
            )
        begin, end = entry["data_offsets"]
        shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{file}: {name} has {end - begin} bytes, its shape says otherwise")
        if start + end > num_bytes:
            raise ValueError(
                f"{file} was cut short: {name} ends at byte {start + end}, the file at {num_bytes}"
            )
        tensors[name] = Stored(file=file, offset=start + begin, shape=shape, dtype=dtype)
    return tensors


def _header(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]
        }  # fmt: skip
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes


def _write_headers(layout: dict[str, Stored]) -> None:
    """Files of their full size with their headers, and the index where there are several."""
    files: dict[Path, dict[str, tuple[int, ...]]] = {}
    for name, place in layout.items():
        files.setdefault(place.file, {})[name] = place.shape
    (dtype,) = {place.dtype for place in layout.values()}
    total_bytes = sum(math.prod(p.shape) * dtype.itemsize for p in layout.values())
    for path, shapes in files.items():
        header = _header(shapes, dtype)
        data_bytes = sum(math.prod(shape) * dtype.itemsize for shape in shapes.values())
        with path.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.flush()
            # Claim the space now: a full disk is found before anything is written.
            try:
                os.posix_fallocate(file.fileno(), 0, 8 + len(header) + data_bytes)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(path)) from error
    if len(files) > 1:
        weight_map = {name: place.file.name for name, place in layout.items()}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (next(iter(files)).parent / INDEX_NAME).write_text(json.dumps(index, indent=2))


def _write_config(
    raw_config: dict[str, Any], folder: Path, tokenizer_path: Path, dtype: torch.dtype
) -> None:
    from ..data.chat import load_tokenizer
    from ..data.model_files import TOKENIZER_FILES

    for name in TOKENIZER_FILES:
        if (tokenizer_path / name).is_file():
            shutil.copyfile(tokenizer_path / name, folder / name)
    config = {k: v for k, v in raw_config.items() if k not in ("torch_dtype", "dtype")}
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if not (folder / "generation_config.json").exists():
        end = load_tokenizer(str(tokenizer_path), needs_chat_template=False).eos_token_id
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}) + "\n")


def shard_bytes(model: Decoder) -> int:
    """Bytes of this rank's rows of all parameters."""
    return sum(local_rows(parameter)[0].nbytes for parameter in model.parameters())
