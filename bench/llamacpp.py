"""Prefill and decoding beside llama.cpp, same weights and prompt: `python -m bench.llamacpp`.

The decoder of the seeded 1e9-parameter checkpoint is written once more as a GGUF file, the format
of llama.cpp: in bf16, or with --weights its layers in few bits, the head in bf16 on both sides.
Q4_1 has as many bits per number as our q4, Q4_0 half a bit less, Q8_0 half a bit more than q8;
"MB" is what a token has to read of each. Both read the same prompt in turn, and then go on behind
it greedily with the same number of threads, a few tokens each in turn, since the speed of this kind
of machine's memory drifts within seconds.

Needs what is no dependency of the project: `pip install llama-cpp-python gguf`, the former built
from its source for this machine's instructions; for one held to AVX2 another build of it,
`CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=OFF"`, and on our side `AVL_ISA=avx2
ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

from bench import common, subject
from bench.common import paired_ratio, progress, summary, write_report

if TYPE_CHECKING:
    import torch

    from engine import Engine

PROMPT = subject.QUESTION + " Look again, and say more." * 24
OURS, THEIRS = "ours, full", "llama.cpp"
KINDS = {"auto": ("BF16",), "q8": ("Q8_0",), "q4": ("Q4_1", "Q4_0")}  # beside our weights
NAMES = {  # in a layer: published name -> name in GGUF
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


class Side(NamedTuple):
    """One of the two: reads the prompt anew, and makes so many more tokens (all ids so far)."""

    read: Callable[[], None]
    go_on: Callable[[int], list[int]]


def main() -> None:
    """Write the GGUF file, measure in turn, report."""
    options = read_options()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    import torch

    from engine import Engine

    torch.set_num_threads(options.threads)
    folder = subject.checkpoint(options)
    engine = Engine.load(
        folder, dtype="bfloat16", device="cpu", cache="full", offline=True, weights=options.weights
    )
    prompt_ids = engine.render(PROMPT).token_ids
    path = write_gguf(folder, folder / f"decoder-{options.kind}.gguf", options.kind)
    tokens = options.tokens * (options.turns + 1)
    sides = {
        OURS: ours(engine, prompt_ids, tokens),
        THEIRS: theirs(path, prompt_ids, options, tokens),
    }
    reading = read_in_turn(sides, options.reads)
    read = {OURS: bytes_of_ours(engine), THEIRS: bytes_of_theirs(path)}
    write(options, reading, *measure(sides, options), len(prompt_ids), read)


def read_options() -> argparse.Namespace:
    parser = common.make_parser(__doc__, name="decode-llamacpp")
    subject.add_arguments(parser)
    parser.set_defaults(preset="1b")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=6, help="of a turn")
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--reads", type=int, default=5, help="times that the prompt is read")
    parser.add_argument("--weights", choices=KINDS, default="auto", help="of our layers")
    kinds = [kind for some in KINDS.values() for kind in some]
    parser.add_argument("--kind", choices=kinds, help="of theirs (default: the like of ours)")
    options = common.read_options(parser)
    options.kind = options.kind or KINDS[options.weights][0]
    return options


def bytes_of_ours(engine: Engine) -> int:
    """What a token has to read of our weights."""
    from engine.models.matrix import matrices

    return sum(matrix.bytes_read(1) for matrix in matrices(engine.model.decoder))


def bytes_of_theirs(path: Path) -> int:
    """What a token has to read of a GGUF file: all matrices but the embedding."""
    from gguf import GGUFReader

    return sum(int(t.n_bytes) for t in GGUFReader(path).tensors if t.name != "token_embd.weight")


def ours(engine: Engine, prompt_ids: list[int], tokens: int) -> Side:
    """Our engine with the exact cache, behind the prompt."""
    from engine.running.batch import job_of

    def read() -> None:
        engine.generate(PROMPT, max_new_tokens=1, ignore_eos=True)

    scheduler = engine.scheduler()
    request = {"prompt": PROMPT, "max_new_tokens": tokens + 2, "ignore_eos": True}
    job = scheduler.submit(job_of(engine, request))
    scheduler.step()
    if job.failed:
        raise job.failed
    assert job.turn.token_ids == prompt_ids

    def go_on(count: int) -> list[int]:
        for _ in range(count):
            scheduler.step()
        return job.answer.token_ids

    return Side(read, go_on)


def theirs(path: Path, prompt_ids: list[int], options: argparse.Namespace, tokens: int) -> Side:
    """llama.cpp behind the same prompt ids, which it reads in one piece."""
    from llama_cpp import Llama

    model = Llama(
        str(path),
        n_ctx=len(prompt_ids) + tokens + 2,
        n_batch=len(prompt_ids),
        n_ubatch=len(prompt_ids),
        n_threads=options.threads,
        n_threads_batch=options.threads,
        verbose=False,
    )
    ids: list[int] = []

    def read() -> None:
        model.reset()
        model.eval(prompt_ids)
        ids[:] = [model.sample(temp=0.0)]

    def go_on(count: int) -> list[int]:
        for _ in range(count):
            model.eval(ids[-1:])
            ids.append(model.sample(temp=0.0))
        return ids

    return Side(read, go_on)


def read_in_turn(sides: dict[str, Side], times: int) -> dict[str, list[float]]:
    """Seconds to read the prompt up to its first token, after one time to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in progress(range(-1, times), "reads"):
        for name in list(sides) if turn % 2 else reversed(sides):
            began = perf_counter()
            sides[name].read()
            if turn >= 0:
                seconds[name].append(perf_counter() - began)
    return seconds


def measure(
    sides: dict[str, Side], options: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, list[int]]]:
    """Seconds per token in every turn after the first, and the answers so far."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    answers: dict[str, list[int]] = {}
    for turn in progress(range(-1, options.turns), "turns"):
        for name in list(sides) if turn % 2 else reversed(sides):
            began = perf_counter()
            answers[name] = sides[name].go_on(options.tokens)
            if turn >= 0:
                seconds[name].append((perf_counter() - began) / options.tokens)
    return seconds, answers


def write(
    options: argparse.Namespace,
    reading: dict[str, list[float]],
    seconds: dict[str, list[float]],
    answers: dict[str, list[int]],
    prompt: int,
    read: dict[str, int],
) -> None:
    """The report."""
    from importlib.metadata import version

    rows = []
    for name, values in seconds.items():
        spread = summary([1 / value for value in values])
        ratio = paired_ratio(seconds[THEIRS], values)
        prefill = paired_ratio(reading[THEIRS], reading[name])
        rows.append(
            {
                "what": name,
                "MB": read[name] / 1e6,
                "GB/s": read[name] * spread["median"] / 1e9,
                "tokens/s": spread["median"],
                "tokens/s p10-p90": f"{spread['p10']:.4g}-{spread['p90']:.4g}",
                "speed-up": ratio["ratio"],
                "speed-up 95%": f"{ratio['low']:.3g}-{ratio['high']:.3g}",
                "prefill s": summary(reading[name])["median"],
                "prefill speed-up": prefill["ratio"],
                "prefill 95%": f"{prefill['low']:.3g}-{prefill['high']:.3g}",
            }
        )
    settings = subject.about(options) | {
        "dtype": "bfloat16",
        "weights": f"{options.weights} beside {options.kind}",
        "threads": options.threads,
        "prompt tokens": prompt,
        "tokens of a turn": options.tokens,
        "turns": options.turns,
        "reads": options.reads,
        "llama-cpp-python": version("llama-cpp-python"),
    }
    pairs = list(zip(answers[OURS], answers[THEIRS], strict=False))
    same = next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
    notes = [f"Ids equal from the start: {same} of {len(pairs)} (near ties in bf16 part them)."]
    path = write_report(options.name, settings, rows, notes, options.out)
    print(path.with_suffix(".md").read_text())


# -- the GGUF file --------------------------------------------------------------------------------


def write_gguf(folder: Path, path: Path, kind: str) -> Path:
    """Writes the decoder of a checkpoint of the LLaVA-1.5 family, unless it is there already.

    Its layers' matrices are of ``kind``, embedding and head in bf16.
    """
    import gguf
    import gguf.quants

    if path.exists():
        return path
    config = json.loads((folder / "config.json").read_text())["text_config"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    add_vocabulary(writer, config["vocab_size"])
    for name, tensor in decoder_tensors(folder, config):
        if tensor.ndim == 1:
            writer.add_tensor(name, tensor.float().numpy())
        elif name.startswith("blk.") and kind != "BF16":
            few = gguf.GGMLQuantizationType[kind]
            packed = gguf.quants.quantize(tensor.float().numpy(), few)
            writer.add_tensor(name, packed, raw_dtype=few)
        else:
            bf16 = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(name, as_bytes(tensor), raw_dtype=bf16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_vocabulary(writer: Any, size: int) -> None:
    """Tokens nobody will read: llama.cpp wants a vocabulary, we feed it ids."""
    from gguf import TokenType

    special = [
        ("<unk>", TokenType.UNKNOWN),
        ("<s>", TokenType.CONTROL),
        ("</s>", TokenType.CONTROL),
    ]
    bytes_ = [(f"<0x{value:02X}>", TokenType.BYTE) for value in range(256)]
    rest = [(f"t{n}", TokenType.NORMAL) for n in range(size - len(special) - len(bytes_))]
    tokens = special + bytes_ + rest
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([kind for _, kind in tokens])


def decoder_tensors(folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names in GGUF and tensors, one at a time."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for full in tensors.keys():  # noqa: SIM118 - not a dictionary
                name = full.removeprefix("language_model.").removesuffix(".weight")
                if name == full.removesuffix(".weight"):
                    continue  # tower and projector
                yield gguf_name(name), in_pairs(name, tensors.get_tensor(full), config)


def gguf_name(name: str) -> str:
    """A published name as GGUF spells it."""
    if name in OUTER:
        return OUTER[name] + ".weight"
    _, _, layer, inner = name.split(".", 3)
    return f"blk.{layer}.{NAMES[inner]}.weight"


def in_pairs(name: str, tensor: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """Queries and keys with the numbers that RoPE turns together side by side, as GGUF has them."""
    heads = {
        "q_proj": config["num_attention_heads"],
        "k_proj": config["num_key_value_heads"],
    }.get(name.rsplit(".", 1)[-1])
    if heads is None:
        return tensor
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def as_bytes(tensor: torch.Tensor) -> Any:
    """A 16-bit matrix as bytes, the way a GGUF writer takes types that NumPy lacks."""
    import torch

    return tensor.contiguous().view(torch.uint8).numpy()


if __name__ == "__main__":
    main()
